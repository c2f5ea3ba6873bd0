"Loops that are not fastai's own: without its events, with a backward or a step more, with batches and losses of every shape."
import numpy as np,pytest,torch
import torch.nn.functional as F
from fastai.basics import *
from torch import nn
from fastai_gradstats import GradNormCallback
from helpers.callbacks import CPUAmp
from helpers.loops import TwoStepsPerBatch
from helpers.oracles import GradSpy,OptimizerTruth,check_against_optimizer,compare_row
from helpers.training import both_callbacks,fit,image_learner,linear_classifier,seeded_mlp,step_learner

# --- loops that leave out events

class WithoutAfterBackward(Learner):
    def _do_one_batch(self):
        self.pred = self.model(*self.xb)
        self.loss = self.loss_grad = self.loss_func(self.pred, *self.yb)
        if not self.training: return
        self('before_backward')
        self.loss_grad.backward()
        if (self.iter+1)%self.every: return
        self._with_events(self.opt.step, 'step', CancelStepException)
        self.opt.zero_grad()

class WithoutEvents(Learner):
    def _do_one_batch(self):
        self.pred = self.model(*self.xb)
        self.loss = self.loss_func(self.pred, *self.yb)
        if not self.training: return
        self.loss.backward()
        if (self.iter+1)%self.every: return
        self.opt.step()
        self.opt.zero_grad()

class TwicePerBatch(Learner):
    "Two steps in a batch, without an event"
    every = 1
    def _do_one_batch(self):
        for _ in range(2):
            self.loss = self.loss_func(self.model(*self.xb), *self.yb)
            if not self.training: return
            self.loss.backward()
            self.opt.step()
            self.opt.zero_grad()

class BackwardItself(Callback):
    "How fastai lets one change the backward"
    def __init__(self, order): self.order = order
    def before_backward(self):
        self.learn.loss_grad.backward()
        raise CancelBackwardException('done here')

@pytest.mark.parametrize('cbs', (both_callbacks, lambda: [GradNormCallback()]), ids=('both','norm'))
@pytest.mark.parametrize('every', (1, 2))
@pytest.mark.parametrize('cls', (WithoutAfterBackward,WithoutEvents))
def test_loops_without_events(cls, every, cbs):
    "Rows and samples do not hang on one event"
    learn = step_learner(cbs(), cls=cls)
    learn.every = every
    truth = OptimizerTruth(learn)
    fit(learn)
    d = learn.grad_norm.df
    assert d['bs'].tolist()==[8*every]*(4//every)
    np.testing.assert_allclose(d['norm'], truth.norms, rtol=1e-5)
    if not hasattr(learn, 'grad_stats'): return
    check_against_optimizer(learn, truth)
    assert learn.grad_stats.select(kind='output').df['iteration'].tolist()==[0,0,1,1,2,2,3,3]

def test_two_steps_in_a_batch_without_events():
    learn = step_learner(both_callbacks(), cls=TwicePerBatch)
    truth = OptimizerTruth(learn)
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.df['norm'], truth.norms, rtol=1e-5)
    assert learn.grad_norm.df['iteration'].tolist()==[0,0,1,1,2,2,3,3]
    check_against_optimizer(learn, truth)

@pytest.mark.parametrize('order', (0, 20))
def test_backward_by_a_callback(order):
    learn = step_learner([*both_callbacks(), BackwardItself(order)])
    truth = OptimizerTruth(learn)
    fit(learn)
    assert learn.grad_norm.df['bs'].tolist()==[8]*4 and len(learn.grad_stats.select(kind='output').df)==8
    check_against_optimizer(learn, truth)

def test_no_step_at_all():
    "A backward that is cancelled with nothing in its place leaves no row of outputs"
    class Skip(Callback):
        order = 20
        def before_backward(self): raise CancelBackwardException('nothing')
    learn = step_learner([*both_callbacks(norm=dict(update_every=1)), Skip()], opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
    fit(learn)
    assert len(learn.grad_stats.df)==0 and learn.grad_norm.df['norm'].isna().all() and (learn.grad_norm.df['nonfinite']==0).all()

# --- steps beside the one

def test_two_steps_in_a_batch():
    "Each step has a number and rows of its own, in the batch's iteration; the second forward is another `call`."
    learn = fit(image_learner(linear_classifier, [*both_callbacks(), (spy := GradSpy())], cls=TwoStepsPerBatch))
    d,s = learn.grad_stats.df,learn.grad_norm.df
    for n in spy.grads[0]:
        rows = d[d['name']==n].to_dict('records')
        for r,gs in zip(rows, spy.grads, strict=True): compare_row(r, gs[n])
        assert [r['step'] for r in rows]==s['step'].tolist()==[*range(8)]
        assert [r['iteration'] for r in rows]==s['iteration'].tolist()==[0,0,1,1,2,2,3,3]
    for norms in s['norm'],learn.grad_norm.by('module')['norm']: np.testing.assert_allclose(norms, spy.norms, rtol=1e-5)
    out = d[d['kind']=='output']
    assert out['call'].tolist()==[0,1]*4 and out['step'].tolist()==[*range(8)]

@pytest.mark.parametrize('kind', ('skipped','cancelled'))
def test_one_of_two_steps_in_a_batch(kind):
    "The second step overflows, or its backward is cancelled: the first keeps its rows, and is not marked."
    class Second(TwoStepsPerBatch):
        def _do_grad_opt(self):
            self.n = getattr(self, 'n', -1)+1
            if self.n%2 and kind=='skipped': self.loss_grad = self.loss_grad*torch.inf
            super()._do_grad_opt()
    class Cancel(Callback):
        order = 5
        def before_backward(self):
            if self.learn.n%2: raise CancelBackwardException('test')
    learn = fit(image_learner(linear_classifier, [*both_callbacks(), CPUAmp(init_scale=1024.) if kind=='skipped' else Cancel()], cls=Second, n=32))
    s,d = learn.grad_norm.df,learn.grad_stats.df
    if kind=='skipped': assert s['skipped'].tolist()==[False,True]*2 and d.groupby('step')['skipped'].agg(['min','max']).values.tolist()==[[False]*2,[True]*2]*2
    else: assert not d['skipped'].any() and d[d['kind']=='output']['call'].tolist()==[0,0]

class AuxiliaryStep(Callback):
    "A step of its own ahead of fastai's"
    def __init__(self, event): setattr(self, event, self.step)
    def step(self):
        if not self.learn.training: return
        self.learn.model(self.learn.xb[0]).square().mean().backward()
        self.learn.opt.step()
        self.learn.opt.zero_grad()
        if self.learn.__dict__.get('loss') is not None: self.learn.pred = self.learn.model(*self.learn.xb)

@pytest.mark.parametrize('event', ('before_batch','after_batch'))
@pytest.mark.parametrize('opt_func', (SGD, partial(OptimWrapper, opt=torch.optim.SGD)), ids=('fastai','torch'))
def test_a_step_ahead_of_fastais(event, opt_func):
    cb = AuxiliaryStep(event)
    cb.order = 50 if event=='before_batch' else 0
    learn = step_learner([*both_callbacks(norm=dict(update_every=1)), cb], opt_func=opt_func)
    truth = OptimizerTruth(learn)
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.df['norm'], truth.norms, rtol=1e-5)
    np.testing.assert_allclose(learn.grad_norm.df['update_norm'].dropna(),
                               [m for m,n in zip(truth.moved, learn.grad_norm.df['update_norm'].notna()) if n], rtol=1e-4)
    check_against_optimizer(learn, truth)

# --- calls within a fit

class CallsLearner(Callback):
    "Calls the Learner in the middle of a fit"
    busy = False
    def __init__(self, event, what): setattr(self, event, partial(self.call, what))
    def call(self, what):
        if self.busy or not self.learn.training and what!='validate': return
        self.busy = True
        kept = {k:self.learn.__dict__[k] for k in ('epoch','train_iter','dl','training') if k in self.learn.__dict__}
        training = self.learn.training
        with self.learn.no_logging(), self.learn.no_bar(): getattr(self.learn, what)()
        self.learn.__dict__.update(kept)
        self.learn.model.train(training)
        self.busy = False

@pytest.mark.parametrize('event', ('after_batch','after_train','after_epoch','before_epoch'))
@pytest.mark.parametrize('what', ('validate','get_preds'))
def test_inner_call_is_no_fit(event, what):
    "Fits are counted by `fit`; the mean norm in the epoch table is the epoch's"
    learn = step_learner([*both_callbacks(norm=dict(show=True)), CallsLearner(event, what)], valid=True)
    fit(learn, 3)
    for d in (learn.grad_stats.df,learn.grad_norm.df): assert d['fit'].unique().tolist()==[0] and d['iteration'].unique().tolist()==list(range(12))
    assert len(learn.grad_stats.record.facts)==1
    assert not any(m._forward_hooks for m in learn.model.modules())
    fit(learn)
    assert learn.grad_norm.df['fit'].unique().tolist()==[0,1]

# --- what a batch and a loss may be

class Stacks(nn.Module):
    def __init__(self, key=None): super().__init__(); self.m,self.key = seeded_mlp(),key
    def forward(self, x): return self.m(torch.stack(list(x)) if isinstance(x, (list,tuple)) else x[self.key] if self.key else x)

class GivenBatches:
    "A loader that gives what it holds"
    def __init__(self, batches): self.batches,self.bs,self.dataset,self.device = batches,1,None,None
    def __len__(self): return len(self.batches)
    def __iter__(self): return iter(self.batches)
    def to(self, device): return self

def dict_target(i): return dict(boxes=torch.rand(3+i,4))
odd_batches = dict(
    detection=(([torch.randn(6)]*2, [dict_target(0), dict_target(1)]), 2),
    empty_list=((torch.randn(5,6), []), 5),
    empty_dict=((torch.randn(5,6), {}), 5),
    dict_x=((dict(x=torch.randn(7,6)), torch.zeros(7)), 7),
    texts=((torch.randn(4,6), ['a','b','c','d']), 4),
    scalar=((torch.randn(3,6), torch.tensor(1.)), 3),
    tuple_y=((torch.randn(4,6), (torch.zeros(4,2),torch.zeros(4))), 4))

@pytest.mark.parametrize('name', odd_batches)
def test_batch_size(name):
    "Samples, not boxes; and a batch that does not say stops nothing"
    batch,n = odd_batches[name]
    dls = DataLoaders(GivenBatches([batch]*3), GivenBatches([batch]))
    dls.n_inp = 1
    learn = step_learner([GradNormCallback()], model=Stacks('x' if name=='dict_x' else None), dls=dls, loss=lambda o,y: o.square().mean())
    fit(learn)
    assert learn.grad_norm.df['bs'].tolist()==[n]*3

@pytest.mark.parametrize('reduce', ('loss_grad','both'))
def test_loss_per_sample(reduce):
    "The mean, as fastai logs it"
    class Reduce(Callback):
        def after_loss(self):
            self.learn.loss_grad = self.loss_grad.mean()
            if reduce=='both': self.learn.loss = self.loss.mean()
    learn = step_learner([*both_callbacks(), Reduce()], loss=partial(F.cross_entropy, reduction='none'))
    want = step_learner(both_callbacks())
    fit(learn), fit(want)
    np.testing.assert_allclose(learn.grad_norm.df['loss'], want.grad_norm.df['loss'], rtol=1e-6)
    np.testing.assert_allclose(learn.grad_norm.df['norm'], want.grad_norm.df['norm'], rtol=1e-6)
