"Who acts on gradients, who drops steps, and loops that are not fastai's own: against what the optimizer really got"
import warnings
from contextlib import contextmanager
import numpy as np,pytest,torch
from fastai.basics import *
from fastai.callback.fp16 import MixedPrecision,NonNativeMixedPrecision,get_master,_copy_state
from fastai.callback.training import GradientAccumulation,GradientClip
from torch import nn
from fastai_gradstats.callback import GradNormCallback,GradStatsCallback
from fastai_gradstats.diagnosis import diagnose
from oracles import TrainOnly,fit,loaders

del test,test_close,test_eq,test_eq_type,test_fail,test_fig_exists,test_is,test_ne,test_shuffled,test_sig,test_stdout,test_warns,test_set   # fastcore's: pytest would collect them

def both(**kwargs): return [GradStatsCallback(), GradNormCallback(**kwargs)]

def data(n=4, bs=8, scale=()):
    "Batches of `bs`, of which those in `scale` (number -> factor) are out of scale"
    x,y = torch.randn(n*bs,6, generator=torch.Generator().manual_seed(0)),torch.arange(n*bs)%3
    for i,factor in dict(scale).items(): x[i*bs:(i+1)*bs] *= factor
    return loaders(x, y, bs)

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6,8), nn.Tanh(), nn.Linear(8,3))

class Truth:
    "Wraps what every loop must call, as the first to do so: copies of gradients and weights right where the optimizer steps"
    def __init__(self, learn):
        self.model,self.got,self.moved = learn.model,[],[]
        if learn.opt is None: learn.create_opt()
        step = learn.opt.step
        def f(*args, **kwargs):
            self.got.append({n:p.grad.detach().double().clone() for n,p in self.model.named_parameters() if p.grad is not None and p.requires_grad})
            old = [p.detach().clone() for p in self.model.parameters()]
            res = step(*args, **kwargs)
            self.moved.append(total(p.detach()-o for p,o in zip(self.model.parameters(), old)))
            return res
        learn.opt.step = f
    @property
    def norms(self): return [total(gs.values()) for gs in self.got]

def linear():
    "Its gradient grows with its input"
    torch.manual_seed(0)
    return nn.Linear(6,3)

def total(ts): return math.sqrt(sum(t.double().square().sum().item() for t in ts))

def learner(cbs=(), model=None, dls=None, loss=F.cross_entropy, cls=Learner, opt_func=SGD, lr=.1, valid=False, **kwargs):
    return cls(dls or data(), model or mlp(), loss_func=loss, opt_func=opt_func, cbs=[*cbs,*([] if valid else [TrainOnly()])], lr=lr, **kwargs)

@contextmanager
def said():
    "What is warned of"
    res = []
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        yield res
    res += [str(o.message) for o in w if 'shadowing' not in str(o.message) and not issubclass(o.category, (FutureWarning,DeprecationWarning))]

def check_rows(learn, truth):
    "Parameter rows of the steps that were taken are the optimizer's gradients"
    d = learn.grad_stats.select(kind='param').df
    taken = learn.grad_norm.df.query('~skipped')['step'].tolist()
    assert len(taken)==len(truth.got)
    for step,gs in zip(taken, truth.got):
        rows = d[d['step']==step]
        assert rows['name'].tolist()==list(gs)
        np.testing.assert_allclose(rows['norm'], [total([g]) for g in gs.values()], rtol=1e-5)

# --- what the optimizer gets

def acts(f, **attrs):
    "A callback class whose events, given by name, call `f(model)`"
    return type('Acts', (Callback,), {'run_valid':False, **{k:v for k,v in attrs.items() if k!='at'}, attrs.get('at', 'before_step'): lambda self: f(self.learn.model)})

def clip(model): nn.utils.clip_grad_norm_(model.parameters(), .1)
def clip_value(model): nn.utils.clip_grad_value_(model.parameters(), .01)
def clip_data(model):
    for p in model.parameters(): p.grad.data.mul_(.1)
def noise(model):
    for p in model.parameters(): p.grad.add_(torch.full_like(p.grad, .01))
def replace(model):
    for p in model.parameters(): p.grad = p.grad*2
class InStep(Learner):
    def _step(self):
        clip(self.model)
        super()._step()
class Moving(Callback):
    def before_batch(self): self.learn.gradient_clip.max_norm = .01*(1+self.iter)
class SwitchedOff(Callback):
    def before_batch(self): self.learn.gradient_clip.run = self.iter<2

late = dict(clip=[acts(clip, order=12)], value=[acts(clip_value, order=10_000)], data=[acts(clip_data, order=11)], noise=[acts(noise, order=5000)], replaced=[acts(replace, order=20)],
            fastai=[partial(GradientClip, .1)], inf=[partial(GradientClip, .1, norm_type=math.inf)], moving=[partial(GradientClip, .3), Moving], off=[partial(GradientClip, .1), SwitchedOff],
            two=[partial(GradientClip, .3), acts(clip, order=30)], none=[])

@pytest.mark.parametrize('name', late)
@pytest.mark.parametrize('opt_func', (SGD, Adam, partial(OptimWrapper, opt=torch.optim.AdamW)), ids=('sgd','adam','wrapper'))
def test_what_the_optimizer_gets(name, opt_func):
    "Whoever acts after the reading, at whatever order: `norm` is the one before, `clipped_norm` what the optimizer got, rows are not clipped"
    plain = learner([*both()], opt_func=opt_func, lr=0.)
    fit(plain)
    learn = learner([*both(), *(c() for c in late[name])], opt_func=opt_func, lr=0.)
    truth = Truth(learn)
    with said() as messages: fit(learn)
    d = learn.grad_norm.df
    np.testing.assert_allclose(d['clipped_norm'], truth.norms, rtol=1e-5)
    np.testing.assert_allclose(d['norm'], plain.grad_norm.df['norm'], rtol=1e-6)
    np.testing.assert_allclose(d['clip_coef'], d['clipped_norm']/d['norm'], rtol=1e-6)
    np.testing.assert_array_equal(learn.grad_stats.df['norm'], plain.grad_stats.df['norm'])
    assert messages==[]

def test_learner_that_clips_in_its_step():
    learn = learner(both(), cls=InStep)
    truth = Truth(learn)
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.df['clipped_norm'], truth.norms, rtol=1e-5)
    assert (learn.grad_norm.df['norm']>.2).all() and np.allclose(truth.norms, .1, rtol=1e-4)

@pytest.mark.parametrize('dtype', (torch.float16,torch.bfloat16))
def test_clipping_in_half_precision(dtype):
    "torch's own norm overflows or is rough there: what is recorded is what came out of it"
    learn = learner([*both(), GradientClip(1.)], model=mlp().to(dtype), dls=loaders(torch.randn(32,6).to(dtype), torch.arange(32)%3, 8), loss=lambda o,y: F.cross_entropy(o.float(), y)*5e4, lr=1e-6)
    truth = Truth(learn)
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.df['clipped_norm'], truth.norms, rtol=1e-5)

def test_gradients_left_in_a_frozen_part():
    "GradientClip counts them, the optimizer does not step there: the record is of what is trained"
    def split(m): return [list(m[0].parameters()),list(m[2].parameters())]
    learn = learner([*both(), GradientAccumulation(24)], splitter=split)
    fit(learn)   # the fourth batch is of no complete group: its gradient stays
    learn.remove_cb(GradientAccumulation)
    learn.model[0].requires_grad_(False)
    learn.add_cb(GradientClip(.2))
    truth = Truth(learn)
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.df.query('fit==1')['clipped_norm'], truth.norms, rtol=1e-5)

# --- somebody acts before we read

@pytest.mark.parametrize('at', ('before_step','after_backward'))
@pytest.mark.parametrize('f', (clip, clip_value, clip_data, noise, replace))
@pytest.mark.parametrize('cbs', (both, lambda: [GradStatsCallback()], lambda: [GradNormCallback()]), ids=('both','stats','norm'))
def test_changed_before_the_reading(at, f, cbs):
    "One sentence that names who acted, and what to do; the rows are what the optimizer got"
    learn = learner([*cbs(), acts(f, at=at)()])
    truth = Truth(learn)
    with said() as messages:
        fit(learn, 2)
        for cb in learn.cbs.filter(lambda c: isinstance(c, (GradStatsCallback,GradNormCallback))): cb.record
    assert len(messages)==1 and 'Acts (order 0)' in messages[0] and '10.6' in messages[0]
    if hasattr(learn, 'grad_norm'): np.testing.assert_allclose(learn.grad_norm.df['norm'], truth.norms, rtol=1e-5)

@pytest.mark.parametrize('order', (-60, 0, 9, 10.4))
def test_who_only_looks_is_not_named(order):
    "A callback that reads gradients ahead of us, with AMP, accumulation and clipping beside it, changes nothing"
    class Looks(Callback):
        def before_step(self): self.seen = total(p.grad for p in self.model.parameters())
        def after_backward(self): self.seen = total(p.grad for p in self.model.parameters())
    Looks.order = order
    learn = learner([*both(), Looks(), CPUAmp(init_scale=64.), GradientAccumulation(16), GradientClip(.3)])
    truth = Truth(learn)
    with said() as messages: fit(learn)
    assert messages==[] and len(truth.got)==2
    np.testing.assert_allclose(learn.grad_norm.df['clipped_norm'], truth.norms, rtol=1e-5)

# --- steps and batches that somebody drops

class Dropper(Callback):
    "Drops what is too large"
    run_valid = False
    def __init__(self, event, exc, clear, order):
        self.exc,self.clear,self.order,self.dropped = exc,clear,order,[]
        setattr(self, event, self.drop)
    def drop(self):
        norm = total(p.grad for p in self.learn.model.parameters())
        if norm<5: return
        self.dropped.append(norm)
        self.clear(self.learn)
        raise self.exc('too large')

def zero_in_place(learn): learn.opt.zero_grad()
def set_to_none(learn): learn.model.zero_grad(set_to_none=True)
def zero_by_hand(learn):
    for p in learn.model.parameters(): p.grad.zero_()
def nothing(learn): pass

drops = [(event,exc,clear,order) for event in ('before_step','after_backward') for exc in (CancelBatchException,CancelFitException,CancelEpochException) for clear in (zero_in_place,set_to_none,zero_by_hand) for order in (-30,0,12)]
drops += [('before_step',CancelStepException,clear,order) for clear in (nothing,zero_in_place,set_to_none) for order in (-30,0,12)]
drops += [('before_step',exc,nothing,order) for exc in (CancelFitException,CancelTrainException) for order in (0,12)]

@pytest.mark.parametrize('event,exc,clear,order', drops, ids=lambda o: getattr(o, '__name__', o))
def test_dropped_step(event, exc, clear, order):
    "The step that somebody drops is the one to see: a row with its norm, `skipped`"
    if event=='after_backward' and order==12: order = 10   # after 10.5 nothing was read there
    cb = Dropper(event, exc, clear, order)
    learn = learner([*both(), cb], model=linear(), dls=data(scale={2:1000}))
    truth = Truth(learn)
    fit(learn)
    d,rows = learn.grad_norm.df,learn.grad_stats.df
    assert d['iteration'].tolist()==d['step'].tolist()==list(range(len(d))) and d['skipped'].tolist()==[i==2 for i in range(len(d))]
    np.testing.assert_allclose(d.loc[2,'norm'], cb.dropped[0], rtol=1e-5)
    np.testing.assert_allclose(d.query('~skipped')['norm'], truth.norms, rtol=1e-5)
    assert rows[rows['iteration']==2]['skipped'].all() and rows.groupby('iteration').size().tolist()==[3]*len(d)
    check_rows(learn, truth)

@pytest.mark.parametrize('kind', ('output','param'))
def test_dropped_step_is_counted_alike(kind):
    "Each callback alone numbers its steps as the other"
    learn = learner([GradStatsCallback(kind), Dropper('before_step', CancelBatchException, zero_in_place, 0)], model=linear(), dls=data(scale={1:1000}))
    fit(learn)
    d = learn.grad_stats.df
    assert d.groupby('step')['skipped'].first().tolist()==[False,True,False,False]

class OwnAccumulation(Callback):
    "Every third batch steps; what the others leave goes into it"
    def __init__(self, order, act=None): self.order,self.act = order,act
    def before_step(self):
        if self.act: self.act(self.learn.model)
        if (self.iter+1)%3: raise CancelBatchException('accumulates')

@pytest.mark.parametrize('act', (None, clip, noise))
@pytest.mark.parametrize('order', (0, 12))
def test_a_batch_that_accumulates_is_no_attempt(order, act):
    "Gradients that are kept go into the next step, whatever was done to them meanwhile"
    learn = learner([*both(), OwnAccumulation(order, act)], dls=data(6))
    truth = Truth(learn)
    fit(learn)
    d = learn.grad_norm.df
    assert d['step'].tolist()==[0,1] and not d['skipped'].any() and d['bs'].tolist()==[24,24]
    np.testing.assert_allclose(d['clipped_norm'], truth.norms, rtol=1e-5)
    assert learn.grad_stats.select(kind='output').df['step'].tolist()==[0]*6+[1]*6

def test_own_step_that_cancels_fastais():
    "A callback that steps by itself: the step was taken"
    class Own(Callback):
        def before_step(self):
            self.learn.opt.step()
            raise CancelStepException('done here')
    learn = learner([*both(), Own()])
    truth = Truth(learn)
    fit(learn)
    assert not learn.grad_norm.df['skipped'].any()
    check_rows(learn, truth)

@pytest.mark.parametrize('exc', (CancelBatchException, CancelFitException))
@pytest.mark.parametrize('order', (0, 20))
@pytest.mark.parametrize('kind', ('both', 'output'))
def test_nan_that_is_skipped_after_the_loss(exc, order, kind):
    "No gradient came of it: it is a break of the forward pass, with its place"
    class SkipNaN(Callback):
        def after_loss(self):
            if self.training and not torch.isfinite(self.loss): raise exc('NaN')
    SkipNaN.order = order
    learn = learner([GradStatsCallback(kind), GradNormCallback(), SkipNaN()], dls=data(scale={2:math.nan}))
    fit(learn)
    assert learn.grad_stats.breaks==[(0, 0, 2, '(input)', '0')]
    found = learn.grad_stats.first_nonfinite()
    assert (found.iteration,found.after,found.before,found.where)==(2, '(input)', '0', 'forward')
    assert not diagnose(learn).ok

# --- a scale that somebody else takes off, tensors that are not the model's

class CPUAmp(MixedPrecision):
    "fastai's, for a CPU"
    def __init__(self, dtype=torch.float16, **kwargs):
        super().__init__()
        self.dtype,self.scaler_kw = dtype,kwargs
    def before_fit(self):
        self.autocast = torch.autocast('cpu', self.dtype)
        self.learn.scaler,self.scales = torch.amp.GradScaler('cpu', enabled=self.dtype==torch.float16, **self.scaler_kw),L()

class OwnScaler(Learner):
    "A loop that hands the step to the scaler, which takes the scale off inside"
    def _do_one_batch(self):
        self.pred = self.model(*self.xb)
        self.loss = self.loss_grad = self.loss_func(self.pred, *self.yb)
        if not self.training: return
        self('before_backward')
        self.scaler.scale(self.loss_grad).backward()
        self('after_backward')
        self._with_events(self._step, 'step', CancelStepException)
        self.opt.zero_grad()
    def _step(self):
        if self.unscale: self.scaler.unscale_(self.opt)
        self.scaler.step(self.opt)
        self.scaler.update()

@pytest.mark.parametrize('opt', (torch.optim.SGD, partial(torch.optim.SGD, fused=True), partial(torch.optim.AdamW, fused=True)), ids=('sgd','fused sgd','fused adamw'))
@pytest.mark.parametrize('unscale', (False, True))
def test_scaler_in_a_loop_of_ones_own(opt, unscale):
    "The same norms as without a scale"
    want = learner(both(), opt_func=partial(OptimWrapper, opt=opt))
    fit(want)
    learn = learner(both(), cls=OwnScaler, opt_func=partial(OptimWrapper, opt=opt))
    learn.unscale,learn.scaler = unscale,torch.amp.GradScaler('cpu', init_scale=1024.)
    fit(learn)
    for c in ('norm','clipped_norm'): np.testing.assert_allclose(learn.grad_norm.df[c], want.grad_norm.df[c], rtol=1e-5)
    np.testing.assert_allclose(learn.grad_stats.df['norm'], want.grad_stats.df['norm'], rtol=1e-5)

class CPUMaster(NonNativeMixedPrecision):
    "fastai's `to_non_native_fp16`, without its check for CUDA"
    def before_fit(self):
        self.model_pgs,self.master_pgs = get_master(self.opt, self.flat_master)
        self.old_pgs = self.opt.param_lists
        _copy_state(self.learn.opt, self.model_pgs, self.master_pgs)
        self.count = 0

def half_data(n=4): return loaders(torch.randn(n*8,6, generator=torch.Generator().manual_seed(0)).half(), torch.arange(n*8)%3, 8)

@pytest.mark.parametrize('flat', (False, True))
@pytest.mark.parametrize('clip', (None, .1))
def test_float32_copies(flat, clip):
    "Rows and norms without the loss scale, the norm before that callback clips, and what the copies got after it"
    kwargs = dict(loss=lambda o,y: F.cross_entropy(o.float(), y), lr=1e-3)
    want = learner(both(), model=mlp().half(), dls=half_data(), **kwargs)
    fit(want)
    amp = CPUMaster(dynamic=False, loss_scale=512, flat_master=flat, clip=clip)
    learn = learner([*both(), amp], model=mlp().half(), dls=half_data(), **kwargs)
    learn.create_opt()
    got,step = [],learn.opt.step
    def f():
        got.append(total(p.grad for ps in learn.opt.param_lists for p in ps))
        step()
    learn.opt.step = f
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.df['norm'], want.grad_norm.df['norm'], rtol=5e-3)
    np.testing.assert_allclose(learn.grad_stats.df['norm'], want.grad_stats.df['norm'], rtol=2e-2)
    np.testing.assert_allclose(learn.grad_norm.df['clipped_norm'], got, rtol=1e-5)
    assert learn.grad_norm.by('group')['group'].unique().tolist()==[0]

def test_float32_copies_overflow():
    "The dynamic scale begins too large: dropped batches are skipped steps"
    amp = CPUMaster(dynamic=True, max_loss_scale=2.**24)
    learn = learner([*both(), amp], model=mlp().half(), dls=half_data(12), loss=lambda o,y: F.cross_entropy(o.float(), y), lr=1e-3)
    learn.create_opt()
    fit(learn)
    d = learn.grad_norm.df
    assert len(d)==12 and d['skipped'].tolist()==(~np.isfinite(d['norm'])).tolist() and 0<d['skipped'].sum()<12
    assert (d.loc[d['skipped'],'nonfinite']>0).all()

# --- weights that somebody moves

def perturb(model, factor=1.):
    with torch.no_grad():
        for p in model.parameters(): p.add_(.05*factor*torch.ones_like(p))

class MovesAndBack(Callback):
    "As SAM does: away before the gradient, back before the step"
    def before_step(self):
        perturb(self.model)
        self.learn.opt.zero_grad()
        self.learn.loss_func(self.model(*self.xb), *self.yb).backward()
        perturb(self.model, -1)

class BackInStep(Callback):
    "The weights come back inside `opt.step`"
    def before_fit(self):
        step = self.learn.opt.step
        def f(*args, **kwargs):
            perturb(self.learn.model, -1)
            return step(*args, **kwargs)
        self.learn.opt.step = f
    def before_step(self): perturb(self.learn.model)

class ByData(BackInStep):
    "The same past autograd's sight"
    def before_step(self):
        for p in self.learn.model.parameters(): p.data = p.data+.05

@pytest.mark.parametrize('cb', (None, MovesAndBack))
def test_weights_put_back_in_time(cb):
    learn = learner([*both(update_every=1), *([cb()] if cb else [])])
    truth = Truth(learn)
    with said() as messages: fit(learn)
    assert not any('moved' in m for m in messages)
    np.testing.assert_allclose(learn.grad_norm.df['update_norm'], truth.moved, rtol=1e-3)

@pytest.mark.parametrize('cb', (BackInStep, ByData))
def test_update_of_moved_weights(cb):
    "What the optimizer moved cannot be told from what others moved: NaN, and a sentence"
    learn = learner([*both(update_every=1), cb()])
    learn.create_opt()
    with said() as messages: fit(learn)
    assert learn.grad_norm.df['update_norm'].isna().all() and learn.grad_norm.by('param')['update_norm'].isna().all()
    assert sum('Weights were moved' in m for m in messages)==1

# --- loops that leave out events, calls within a fit

class NoAfterBackward(Learner):
    def _do_one_batch(self):
        self.pred = self.model(*self.xb)
        self.loss = self.loss_grad = self.loss_func(self.pred, *self.yb)
        if not self.training: return
        self('before_backward')
        self.loss_grad.backward()
        if (self.iter+1)%self.every: return
        self._with_events(self.opt.step, 'step', CancelStepException)
        self.opt.zero_grad()

class NoEvents(Learner):
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

@pytest.mark.parametrize('cbs', (both, lambda: [GradNormCallback()]), ids=('both','norm'))
@pytest.mark.parametrize('every', (1, 2))
@pytest.mark.parametrize('cls', (NoAfterBackward,NoEvents))
def test_loops_without_events(cls, every, cbs):
    "Rows and samples do not hang on one event"
    learn = learner(cbs(), cls=cls)
    learn.every = every
    truth = Truth(learn)
    fit(learn)
    d = learn.grad_norm.df
    assert d['bs'].tolist()==[8*every]*(4//every)
    np.testing.assert_allclose(d['norm'], truth.norms, rtol=1e-5)
    if not hasattr(learn, 'grad_stats'): return
    check_rows(learn, truth)
    assert learn.grad_stats.select(kind='output').df['iteration'].tolist()==[0,0,1,1,2,2,3,3]

def test_two_steps_in_a_batch_without_events():
    learn = learner(both(), cls=TwicePerBatch)
    truth = Truth(learn)
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.df['norm'], truth.norms, rtol=1e-5)
    assert learn.grad_norm.df['iteration'].tolist()==[0,0,1,1,2,2,3,3]
    check_rows(learn, truth)

@pytest.mark.parametrize('order', (0, 20))
def test_backward_by_a_callback(order):
    learn = learner([*both(), BackwardItself(order)])
    truth = Truth(learn)
    fit(learn)
    assert learn.grad_norm.df['bs'].tolist()==[8]*4 and len(learn.grad_stats.select(kind='output').df)==8
    check_rows(learn, truth)

def test_no_step_at_all():
    "A backward that is cancelled with nothing in its place leaves no row of outputs"
    class Skip(Callback):
        order = 20
        def before_backward(self): raise CancelBackwardException('nothing')
    learn = learner([*both(update_every=1), Skip()], opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
    fit(learn)
    assert len(learn.grad_stats.df)==0 and learn.grad_norm.df['norm'].isna().all() and (learn.grad_norm.df['nonfinite']==0).all()

class Inner(Callback):
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
    learn = learner([*both(show=True), Inner(event, what)], valid=True)
    fit(learn, 3)
    for d in (learn.grad_stats.df,learn.grad_norm.df): assert d['fit'].unique().tolist()==[0] and d['iteration'].unique().tolist()==list(range(12))
    assert len(learn.grad_stats.record.facts)==1
    assert not any(m._forward_hooks for m in learn.model.modules())
    fit(learn)
    assert learn.grad_norm.df['fit'].unique().tolist()==[0,1]

def test_fit_after_an_interrupt_is_a_new_one():
    "An interrupt sends no event: fits are counted all the same"
    class Stop(Callback):
        def __init__(self, event): setattr(self, event, self.stop)
        def stop(self): raise KeyboardInterrupt
    learn = learner(both(), valid=True)
    for event in ('before_validate','after_batch','after_epoch'):
        with pytest.raises(KeyboardInterrupt): fit(learn, cbs=Stop(event))
    fit(learn)
    assert learn.grad_norm.df['fit'].unique().tolist()==[0,1,2,3]

class At(Callback):
    "Does something to the callbacks at one iteration"
    def __init__(self, do, event='after_batch', it=1, order=0): self.do,self.it,self.order = do,it,order; setattr(self, event, self.act)
    def act(self):
        if self.learn.train_iter==self.it+1 or self.learn.iter==self.it and not hasattr(self, 'done'):
            self.done = True
            self.do(self.learn)

def off_and_on(learn):
    with learn.removed_cbs(learn.cbs.filter(lambda c: isinstance(c, (GradStatsCallback,GradNormCallback)))): pass
def switch_off(learn): learn.grad_stats.run = False
def add(learn): learn.add_cbs(both())

@pytest.mark.parametrize('order', (0, 20))
def test_taken_off_and_put_back(order):
    learn = learner([*both(), At(off_and_on, order=order)])
    truth = Truth(learn)
    fit(learn, 2)
    assert learn.grad_stats.df['iteration'].unique().tolist()==list(range(8)) and (learn.grad_stats.df['fit']==0).all()
    check_rows(learn, truth)

@pytest.mark.parametrize('order', (0, 20))
def test_switched_off(order):
    "`run=False`: what follows is not recorded, nothing waits, no hook stays; fastai switches it on again for the next fit"
    learn = learner([*both(), At(switch_off, order=order)])
    fit(learn)
    assert learn.grad_stats.df.groupby('iteration').size().to_dict()=={0:6, 1:6}
    assert learn.grad_norm.df['iteration'].tolist()==[0,1,2,3]
    assert not any(m._forward_hooks for m in learn.model.modules())
    fit(learn, cbs=[])
    assert learn.grad_stats.df['iteration'].nunique()>2

@pytest.mark.parametrize('event', ('after_batch','after_epoch'))
def test_added_in_mid_fit(event):
    "Recorded from then on, as fit 0 with its facts"
    learn = learner([At(add, event, it=1 if event=='after_batch' else 3)])
    fit(learn, 2)
    n = {'after_batch':6, 'after_epoch':4}[event]
    assert learn.grad_norm.df['iteration'].tolist()==list(range(n)) and (learn.grad_stats.df['fit']==0).all()
    assert [f['fit'] for f in learn.grad_stats.record.facts]==[0]
    assert not any(m._forward_hooks for m in learn.model.modules()) and 'step' not in learn.opt.__dict__

def test_one_batch_without_a_fit():
    learn = learner(both(), default_cbs=False)
    learn.create_opt()
    learn.training = True
    learn.one_batch(0, first(learn.dls.train))
    assert len(learn.grad_stats.df)==len(learn.grad_norm.df)==0

# --- what a batch and a loss may be

class Stacks(nn.Module):
    def __init__(self, key=None): super().__init__(); self.m,self.key = mlp(),key
    def forward(self, x): return self.m(torch.stack(list(x)) if isinstance(x, (list,tuple)) else x[self.key] if self.key else x)

class Batches:
    "A loader that gives what it holds"
    def __init__(self, batches): self.batches,self.bs,self.dataset,self.device = batches,1,None,None
    def __len__(self): return len(self.batches)
    def __iter__(self): return iter(self.batches)
    def to(self, device): return self

def dict_target(i): return dict(boxes=torch.rand(3+i,4))
batches = dict(detection=(([torch.randn(6)]*2, [dict_target(0), dict_target(1)]), 2), empty_list=((torch.randn(5,6), []), 5), empty_dict=((torch.randn(5,6), {}), 5), dict_x=((dict(x=torch.randn(7,6)), torch.zeros(7)), 7),
               texts=((torch.randn(4,6), ['a','b','c','d']), 4), scalar=((torch.randn(3,6), torch.tensor(1.)), 3), tuple_y=((torch.randn(4,6), (torch.zeros(4,2),torch.zeros(4))), 4))

@pytest.mark.parametrize('name', batches)
def test_batch_size(name):
    "Samples, not boxes; and a batch that does not say stops nothing"
    batch,n = batches[name]
    dls = DataLoaders(Batches([batch]*3), Batches([batch]))
    dls.n_inp = 1
    learn = learner([GradNormCallback()], model=Stacks('x' if name=='dict_x' else None), dls=dls, loss=lambda o,y: o.square().mean())
    fit(learn)
    assert learn.grad_norm.df['bs'].tolist()==[n]*3

@pytest.mark.parametrize('reduce', ('loss_grad','both'))
def test_loss_per_sample(reduce):
    "The mean, as fastai logs it"
    class Reduce(Callback):
        def after_loss(self):
            self.learn.loss_grad = self.loss_grad.mean()
            if reduce=='both': self.learn.loss = self.loss.mean()
    learn = learner([*both(), Reduce()], loss=partial(F.cross_entropy, reduction='none'))
    want = learner(both())
    fit(learn), fit(want)
    np.testing.assert_allclose(learn.grad_norm.df['loss'], want.grad_norm.df['loss'], rtol=1e-6)
    np.testing.assert_allclose(learn.grad_norm.df['norm'], want.grad_norm.df['norm'], rtol=1e-6)

@pytest.mark.parametrize('scaler', (object(), 'a text', None, torch.amp.GradScaler('cpu', enabled=False)), ids=('object','text','none','disabled'))
def test_scaler_that_is_none(scaler):
    "Whatever `learn.scaler` is; and a step that is cancelled beside it"
    learn = learner([*both(), Dropper('before_step', CancelStepException, nothing, 0)], model=linear(), dls=data(scale={1:1000}))
    learn.scaler = scaler
    fit(learn)
    assert learn.grad_norm.df['skipped'].tolist()==[False,True,False,False]

@pytest.mark.parametrize('kind', (nn.LazyLinear, None))
def test_lazy_layers(kind):
    "The first batch makes them: recorded from it on, with the dimensions they have then"
    model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))
    learn = learner(both(update_every=1), model=model) if kind else learner([GradNormCallback()], model=model)
    truth = None
    fit(learn)
    assert learn.grad_norm.df['norm'].notna().all() and learn.grad_norm.record.facts[0]['params']==[['0.weight',True,2],['0.bias',True,1],['2.weight',True,2],['2.bias',True,1]] or \
           [tuple(p) for p in learn.grad_norm.record.facts[0]['params']]==[('0.weight',True,2),('0.bias',True,1),('2.weight',True,2),('2.bias',True,1)]

# --- arguments

@pytest.mark.parametrize('name,value', (('hist',True), ('threshold',.01), ('extra',{'k':lambda g: g.sum()}), ('keep',2)))
def test_lasting_arguments(name, value):
    "They may change while the record is empty; later they stay, with a word"
    learn = learner([GradStatsCallback()])
    setattr(learn.grad_stats, name, value)
    fit(learn)
    want = learner([GradStatsCallback(**{name:value})])
    fit(want)
    assert learn.grad_stats.df.equals(want.grad_stats.df)
    setattr(learn.grad_stats, name, GradStatsCallback().__dict__[name])
    with said() as messages: fit(learn)
    assert len(messages)==1 and f'{name} stays' in messages[0]
    fit(want)
    assert list(learn.grad_stats.df)==list(want.grad_stats.df) and len(learn.grad_stats.df)==len(want.grad_stats.df)

@pytest.mark.parametrize('name,value', (('show',True), ('update_every',1)))
def test_lasting_arguments_of_norms(name, value):
    learn = learner([GradNormCallback()], valid=True)
    fit(learn)
    setattr(learn.grad_norm, name, value)
    with said() as messages: fit(learn)
    assert len(messages)==1 and f'{name} stays' in messages[0] and len(learn.grad_norm.df)==8

@pytest.mark.parametrize('name,value', (('every',2), ('include','0'), ('kind','param')))
def test_arguments_that_may_change(name, value):
    learn = learner([GradStatsCallback()])
    fit(learn)
    setattr(learn.grad_stats, name, value)
    fit(learn)
    want = learner([GradStatsCallback(**{name:value})])
    fit(want)
    assert len(learn.grad_stats.select(fit=1).df)==len(want.grad_stats.df)
    setattr(learn.grad_stats, name, 0)
    with pytest.raises((ValueError,TypeError), match=f'{name}:'): fit(learn)

def test_update_every_beside_every():
    with pytest.raises(ValueError, match='update_every: .*every=3'): GradNormCallback(every=3, update_every=2)
    learn = learner([GradNormCallback(every=2, update_every=4)], dls=data(8))
    fit(learn)
    assert learn.grad_norm.df['step'].tolist()==[0,2,4,6] and learn.grad_norm.df['update_norm'].notna().tolist()==[True,False]*2

def test_numpy_numbers_and_copies(monkeypatch):
    "numpy's integers are integers; a copy has a record of its own; RANK without processes is a word in the environment"
    cb = GradStatsCallback(every=np.int64(1), keep=np.int32(50), threshold=np.float32(.5))
    monkeypatch.setenv('RANK', '1')
    learn = learner()
    fit(learn, cbs=cb)
    twin = copy(cb)
    fit(learn, cbs=twin)
    assert (len(cb.df),len(twin.df))==(24,48)

# --- an error of ours

def test_an_error_of_ours_costs_a_sentence():
    "The user's own statistic raises at one iteration: that batch has no rows, the rest has, and training is as without us"
    calls = []
    def fails(g):
        calls.append(1)
        if len(calls)==8: raise RuntimeError('no such number')
        return g.sum()
    learn = learner([GradStatsCallback(extra=dict(fails=fails)), GradNormCallback()])
    with said() as messages: fit(learn)
    bare = learner()
    fit(bare)
    assert all(torch.equal(a, b) for a,b in zip(learn.model.state_dict().values(), bare.model.state_dict().values()))
    assert any('no such number' in m for m in messages)
    assert learn.grad_norm.df['step'].tolist()==[0,1,2,3] and learn.grad_stats.df['iteration'].nunique()>=3

# --- found by an attack: who acts where nobody looked

class ClipsLate(Callback):
    "Of the order that GradientClip has, but in `after_backward`: that is before anybody reads"
    order = 11
    def after_backward(self): clip(self.model)
class ClipsInBackward(Learner):
    def _backward(self):
        super()._backward()
        clip(self.model)
class ClipsInBetween(Learner):
    def _do_grad_opt(self):
        self._with_events(self._backward, 'backward', CancelBackwardException)
        clip(self.model)
        self._with_events(self._step, 'step', CancelStepException)
        self.opt.zero_grad()
class Composite(Callback):
    "Acts in a `__call__` of its own"
    def __call__(self, event):
        if event=='before_step': clip(self.model)

@pytest.mark.parametrize('cbs,cls,name', (([ClipsLate],Learner,'ClipsLate'), ([],ClipsInBackward,'ClipsInBackward'), ([],ClipsInBetween,'ClipsInBetween'), ([Composite],Learner,'Composite')), ids=lambda o: str(o)[:20])
def test_everybody_who_acts_before_is_named(cbs, cls, name):
    learn = learner([*both(), *(c() for c in cbs)], cls=cls)
    with said() as messages:
        fit(learn)
        learn.grad_norm.record
    assert len(messages)==1 and name in messages[0]

class ForOneBatch(Callback):
    "A clip that comes with the batch and goes with it"
    def before_backward(self): self.learn.add_cb(GradientClip(.1))
    def after_batch(self): self.learn.remove_cbs(self.learn.cbs.filter(lambda c: isinstance(c, GradientClip)))
class Swaps(Callback):
    "Two optimizers, chosen after the batch began"
    order = 20
    def before_fit(self): self.two = [SGD(trainable_params(self.model), lr=0.) for _ in range(2)]
    def before_batch(self): self.learn.opt = self.two[self.iter%2]
class Wraps(Callback):
    "Wraps `opt.step` in mid-fit"
    def before_backward(self):
        if self.iter: return
        step = self.learn.opt.step
        def f(*args, **kwargs):
            clip(self.learn.model)
            return step(*args, **kwargs)
        self.learn.opt.step = f
class CompositeLate(Composite): order = 50

@pytest.mark.parametrize('cbs', ([ForOneBatch],[Swaps,partial(GradientClip, .1)],[Wraps],[CompositeLate]), ids=('for one batch','two optimizers','wrapped','composite'))
def test_measured_whoever_clips(cbs):
    learn = learner([*both(), *(c() for c in cbs)], lr=0.)
    want = learner(both(), lr=0.)
    fit(learn), fit(want)
    np.testing.assert_allclose(learn.grad_norm.df['norm'], want.grad_norm.df['norm'], rtol=1e-6)
    np.testing.assert_allclose(learn.grad_norm.df['clipped_norm'], .1, rtol=1e-4)

@pytest.mark.parametrize('opt_func', (SGD, partial(OptimWrapper, opt=torch.optim.SGD)), ids=('zeros','none'))
def test_gradients_that_are_cleared_after_the_reading(opt_func):
    "Nothing reaches the optimizer"
    class Clears(Callback):
        order = 50
        def before_step(self): self.learn.opt.zero_grad()
    learn = learner([*both(update_every=1), Clears()], opt_func=opt_func)
    fit(learn)
    assert (learn.grad_norm.df['norm']>.1).all() and (learn.grad_norm.df[['clipped_norm','update_norm']]==0).all(axis=None)

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
    learn = learner([*both(update_every=1), cb], opt_func=opt_func)
    truth = Truth(learn)
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.df['norm'], truth.norms, rtol=1e-5)
    np.testing.assert_allclose(learn.grad_norm.df['update_norm'].dropna(), [m for m,n in zip(truth.moved, learn.grad_norm.df['update_norm'].notna()) if n], rtol=1e-4)
    check_rows(learn, truth)

def test_scaler_left_behind_by_an_interrupt():
    "Ctrl-C in fp16, then `to_fp32`: nobody scales any more, though the scaler is there"
    class CtrlC(Callback):
        def after_batch(self):
            if self.iter==2: raise KeyboardInterrupt
    amp,ctrl_c = CPUAmp(torch.bfloat16),CtrlC()
    amp.before_fit = lambda: None
    learn = learner([*both(), amp, ctrl_c])
    amp.autocast = torch.autocast('cpu', torch.bfloat16)
    learn.scaler,amp.scales = torch.amp.GradScaler('cpu', init_scale=2.**16),L()
    with pytest.raises(KeyboardInterrupt): fit(learn)
    learn.remove_cbs([amp, ctrl_c])
    assert learn.scaler.is_enabled()
    truth = Truth(learn)
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.select(fit=1).steps['norm'], truth.norms, rtol=1e-5)

class Grows(Callback):
    def change(self): self.learn.model.append(nn.Linear(3,3))
class Replaces(Callback):
    def change(self): self.learn.model[0].weight = nn.Parameter(self.learn.model[0].weight.detach()*2)
class Another(Callback):
    def change(self): self.learn.model = nn.Sequential(nn.Linear(6,3))
for c in (Grows,Replaces,Another):
    def after_batch(self):
        if not self.learn.training or self.learn.iter!=1: return
        self.change()
        self.learn.create_opt()
    c.after_batch = after_batch

@pytest.mark.parametrize('cb', (Grows,Replaces,Another))
def test_network_that_changes_in_mid_epoch(cb):
    class Total(Callback):
        order,norms = 999,()
        def before_step(self): self.norms = [*self.norms, total(p.grad for p in self.learn.model.parameters())]
    learn = learner([*both(), cb(), norms := Total()])
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.df['norm'], norms.norms, rtol=1e-5)
    d = learn.grad_stats.df
    assert (d['fit']==0).all() and d[d['kind']=='output'].groupby('iteration').size().tolist()==[2,2]+[{Grows:3,Replaces:2,Another:1}[cb]]*2

def test_weights_that_move_in_forward():
    "`Embedding(max_norm=)` renorms its weights in forward: nothing to say of it, and the update is the optimizer's"
    class Emb(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.e,self.h = nn.Embedding(10,6, max_norm=1.),nn.Linear(6,3)
        def forward(self, x): return self.h(self.e(x).mean(1))
    x = torch.randint(10, (32,4), generator=torch.Generator().manual_seed(0))
    learn = learner(both(update_every=1), model=Emb(), dls=loaders(x, torch.arange(32)%3, 8))
    truth = Truth(learn)
    with said() as messages: fit(learn)
    assert messages==[]
    np.testing.assert_allclose(learn.grad_norm.df['update_norm'], truth.moved, rtol=1e-4)

def test_weights_that_move_after_the_step():
    "A clamp in `after_step` (WGAN) is no update of the optimizer's"
    class Clamp(Callback):
        def after_step(self):
            for p in self.learn.model.parameters(): p.data.clamp_(-.05,.05)
    learn = learner([*both(update_every=1), Clamp()])
    truth = Truth(learn)
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.df['update_norm'], truth.moved, rtol=1e-4)

def test_output_kept_over_iterations():
    "A tensor that a module returns again and again has one row an iteration, and no hook of ours in the end"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.m,self.prompt = mlp(),Prompt()
        def forward(self, x): return self.m(x+self.prompt())
    class Prompt(nn.Module):
        def __init__(self): super().__init__(); self.w,self.kept = nn.Parameter(torch.ones(6)),None
        def forward(self):
            if self.kept is None: self.kept = self.w*2
            return self.kept
    class Keeps(Learner):
        def _backward(self): self.loss_grad.backward(retain_graph=True)
    learn = learner(both(), model=Net(), cls=Keeps)
    fit(learn)
    d = learn.grad_stats.df
    assert d[(d['kind']=='output')&(d['name']=='prompt')].groupby('iteration').size().tolist()==[1]*4
    assert not learn.model.prompt.kept._backward_hooks

def test_warnings_that_are_errors(capsys):
    "A sentence of ours ends no training"
    learn = learner([*both(), acts(clip)()])
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        fit(learn)
        assert len(learn.grad_norm.df)==4
    assert 'changed the gradients' in capsys.readouterr().err
