"What the optimizer gets, and who acted on it: accumulation, clipping, weight decay, dropped steps, weights that somebody moves."
import math
import numpy as np,pytest,torch
from fastai.basics import *
from fastai.callback.training import GradientAccumulation,GradientClip
from torch import nn
from fastai_gradstats import GradNormCallback,GradStatsCallback
from helpers.callbacks import CPUAmp,Dropper,OwnClip,acting_callback,clip_gradients,leave_gradients,total_norm
from helpers.oracles import GradSpy,OptimizerTruth,check_against_optimizer,check_against_spy
from helpers.training import both_callbacks,fit,image_learner,linear_classifier,loaders,small_linear,step_learner,vector_batches,warned

# --- norms, of weights too

@pytest.mark.parametrize('opt',
                         (partial(Adam, wd=.1), partial(Adam, wd=.1, decouple_wd=False),
                          partial(OptimWrapper, opt=partial(torch.optim.AdamW, weight_decay=.1))),
                         ids='adam l2 wrapper'.split())
def test_weight_decay_is_no_gradient(opt):
    spy = GradSpy()
    check_against_spy(fit(image_learner(cbs=[*both_callbacks(), spy], opt_func=opt), 2), spy)

def test_weights_and_products():
    "Weight norm and gradient times weight are of the weights that produced the gradient; module and group norms combine."
    ws = []
    class Keep(GradSpy):
        def before_step(self):
            super().before_step()
            ws.append({n:p.detach().double().numpy().copy() for n,p in self.model.named_parameters()})
    learn = fit(image_learner(cbs=[*both_callbacks(), (spy := Keep())]))
    p = learn.grad_norm.by('param')
    for s,(gs,w) in enumerate(zip(spy.grads, ws)):
        d = p[p['step']==s].set_index('name')
        np.testing.assert_allclose(d['norm'], [np.linalg.norm(g) for g in gs.values()], rtol=1e-5)
        np.testing.assert_allclose(d['weight_norm'], [np.linalg.norm(w[n]) for n in gs], rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(d['dot'], [(w[n]*g).sum() for n,g in gs.items()], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(learn.grad_norm.df['weight_norm'], [np.sqrt(sum((o**2).sum() for o in w.values())) for w in ws], rtol=1e-5)
    for by in ('module','group'):
        np.testing.assert_allclose(np.sqrt((learn.grad_norm.by(by)['norm']**2).groupby(learn.grad_norm.by(by)['step']).sum()), learn.grad_norm.norms, rtol=1e-5)

def test_one_reader_equals_two():
    "GradNormCallback alone and beside GradStatsCallback, with which it shares the read."
    a,b = (fit(image_learner(cbs=c)).grad_norm.record for c in ([GradNormCallback()], both_callbacks()))
    for x,y in ((a.steps,b.steps), (a.by('param'),b.by('param'))):
        for c in x: np.testing.assert_allclose(x[c], y[c], rtol=1e-6, atol=1e-9) if x[c].dtype.kind=='f' else np.testing.assert_array_equal(x[c], y[c])

# --- accumulation and clipping

def test_last_group_leaks():
    "fastai steps on no incomplete group; its gradient goes into the first step of the next fit. The rows say what the optimizer got."
    spy = GradSpy()
    learn = image_learner(linear_classifier, [*both_callbacks(), GradientAccumulation(32), spy], n=80)
    fit(learn); fit(learn)
    check_against_spy(learn, spy)
    assert learn.grad_norm.df['iteration'].tolist()==[1,3,6,8]
    one = fit(image_learner(linear_classifier, [*both_callbacks(), (alone := GradSpy()), GradientAccumulation(32)], n=80))
    assert learn.grad_norm.norms[2] > 1.1*one.grad_norm.norms[0]

class NormsBeforeStep(Callback):
    "Norms just before the step"
    order = 2000
    def __init__(self): self.norms = []
    def before_step(self): self.norms.append(nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).item())

@pytest.mark.parametrize('clip',
                         (lambda: GradientClip(.1), lambda: GradientClip(100.), lambda: GradientClip(.01, norm_type=float('inf')),
                          OwnClip),
                         ids='2 2-large inf own'.split())
@pytest.mark.parametrize('opt', (SGD, partial(SGD, decouple_wd=False, wd=.1)), ids='sgd l2'.split())
def test_clipping(clip, opt):
    spy,after = GradSpy(),NormsBeforeStep()
    learn = fit(image_learner(cbs=[*both_callbacks(), spy, after, clip()], opt_func=opt))
    check_against_spy(learn, spy)
    df = learn.grad_norm.df
    np.testing.assert_allclose(df['clipped_norm'], after.norms, rtol=1e-5)
    np.testing.assert_allclose(df['norm']*df['clip_coef'], df['clipped_norm'], rtol=1e-5)
    assert len(learn.cbs)==len(fit(learn).cbs) and not any(c.order==1000 for c in learn.cbs)

def test_gradients_left_in_a_frozen_part():
    "GradientClip counts them, the optimizer does not step there: the record is of what is trained"
    def split(m): return [list(m[0].parameters()),list(m[2].parameters())]
    learn = step_learner([*both_callbacks(), GradientAccumulation(24)], splitter=split)
    fit(learn)   # the fourth batch is of no complete group: its gradient stays
    learn.remove_cb(GradientAccumulation)
    learn.model[0].requires_grad_(False)
    learn.add_cb(GradientClip(.2))
    truth = OptimizerTruth(learn)
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.df.query('fit==1')['clipped_norm'], truth.norms, rtol=1e-5)

# --- somebody acts after we read
def clip_elements(model): nn.utils.clip_grad_value_(model.parameters(), .01)
def clip_data(model):
    for p in model.parameters(): p.grad.data.mul_(.1)
def add_noise(model):
    for p in model.parameters(): p.grad.add_(torch.full_like(p.grad, .01))
def double_by_replacing(model):
    for p in model.parameters(): p.grad = p.grad*2
class InStep(Learner):
    def _step(self):
        clip_gradients(self.model)
        super()._step()
class Moving(Callback):
    def before_batch(self): self.learn.gradient_clip.max_norm = .01*(1+self.iter)
class SwitchedOff(Callback):
    def before_batch(self): self.learn.gradient_clip.run = self.iter<2

late_changes = dict(
    clip=[acting_callback(clip_gradients, order=12)],
    value=[acting_callback(clip_elements, order=10_000)],
    data=[acting_callback(clip_data, order=11)],
    noise=[acting_callback(add_noise, order=5000)],
    replaced=[acting_callback(double_by_replacing, order=20)],
    fastai=[partial(GradientClip, .1)],
    inf=[partial(GradientClip, .1, norm_type=math.inf)],
    moving=[partial(GradientClip, .3), Moving],
    off=[partial(GradientClip, .1), SwitchedOff],
    two=[partial(GradientClip, .3), acting_callback(clip_gradients, order=30)],
    none=[])

@pytest.mark.parametrize('name', late_changes)
@pytest.mark.parametrize('opt_func', (SGD, Adam, partial(OptimWrapper, opt=torch.optim.AdamW)), ids=('sgd','adam','wrapper'))
def test_what_the_optimizer_gets(name, opt_func):
    "Whoever acts after the reading, at whatever order: `norm` is the one before, `clipped_norm` what the optimizer got, rows are not clipped"
    plain = step_learner([*both_callbacks()], opt_func=opt_func, lr=0.)
    fit(plain)
    learn = step_learner([*both_callbacks(), *(c() for c in late_changes[name])], opt_func=opt_func, lr=0.)
    truth = OptimizerTruth(learn)
    with warned() as messages: fit(learn)
    d = learn.grad_norm.df
    np.testing.assert_allclose(d['clipped_norm'], truth.norms, rtol=1e-5)
    np.testing.assert_allclose(d['norm'], plain.grad_norm.df['norm'], rtol=1e-6)
    np.testing.assert_allclose(d['clip_coef'], d['clipped_norm']/d['norm'], rtol=1e-6)
    np.testing.assert_array_equal(learn.grad_stats.df['norm'], plain.grad_stats.df['norm'])
    assert messages==[]

def test_learner_that_clips_in_its_step():
    learn = step_learner(both_callbacks(), cls=InStep)
    truth = OptimizerTruth(learn)
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.df['clipped_norm'], truth.norms, rtol=1e-5)
    assert (learn.grad_norm.df['norm']>.2).all() and np.allclose(truth.norms, .1, rtol=1e-4)

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
            clip_gradients(self.learn.model)
            return step(*args, **kwargs)
        self.learn.opt.step = f
class Composite(Callback):
    "Acts in a `__call__` of its own"
    def __call__(self, event):
        if event=='before_step': clip_gradients(self.model)
class CompositeLate(Composite): order = 50

@pytest.mark.parametrize('cbs', ([ForOneBatch],[Swaps,partial(GradientClip, .1)],[Wraps],[CompositeLate]),
                         ids=('for one batch','two optimizers','wrapped','composite'))
def test_measured_whoever_clips(cbs):
    learn = step_learner([*both_callbacks(), *(c() for c in cbs)], lr=0.)
    want = step_learner(both_callbacks(), lr=0.)
    fit(learn), fit(want)
    np.testing.assert_allclose(learn.grad_norm.df['norm'], want.grad_norm.df['norm'], rtol=1e-6)
    np.testing.assert_allclose(learn.grad_norm.df['clipped_norm'], .1, rtol=1e-4)

@pytest.mark.parametrize('opt_func', (SGD, partial(OptimWrapper, opt=torch.optim.SGD)), ids=('zeros','none'))
def test_gradients_that_are_cleared_after_the_reading(opt_func):
    "Nothing reaches the optimizer"
    class Clears(Callback):
        order = 50
        def before_step(self): self.learn.opt.zero_grad()
    learn = step_learner([*both_callbacks(norm=dict(update_every=1)), Clears()], opt_func=opt_func)
    fit(learn)
    assert (learn.grad_norm.df['norm']>.1).all() and (learn.grad_norm.df[['clipped_norm','update_norm']]==0).all(axis=None)

# --- somebody acts before we read

@pytest.mark.parametrize('at', ('before_step','after_backward'))
@pytest.mark.parametrize('f', (clip_gradients, clip_elements, clip_data, add_noise, double_by_replacing))
@pytest.mark.parametrize('cbs', (both_callbacks, lambda: [GradStatsCallback()], lambda: [GradNormCallback()]), ids=('both','stats','norm'))
def test_changed_before_the_reading(at, f, cbs):
    "One sentence that names who acted, and what to do; the rows are what the optimizer got"
    learn = step_learner([*cbs(), acting_callback(f, at=at)()])
    truth = OptimizerTruth(learn)
    with warned() as messages:
        fit(learn, 2)
        for cb in learn.cbs.filter(lambda c: isinstance(c, (GradStatsCallback,GradNormCallback))): cb.record
    assert len(messages)==1 and 'Acts (order 0)' in messages[0] and '10.6' in messages[0]
    if hasattr(learn, 'grad_norm'): np.testing.assert_allclose(learn.grad_norm.df['norm'], truth.norms, rtol=1e-5)

@pytest.mark.parametrize('order', (-60, 0, 9, 10.4))
def test_who_only_looks_is_not_named(order):
    "A callback that reads gradients ahead of us, with AMP, accumulation and clipping beside it, changes nothing"
    class Looks(Callback):
        def before_step(self): self.seen = total_norm(p.grad for p in self.model.parameters())
        def after_backward(self): self.seen = total_norm(p.grad for p in self.model.parameters())
    Looks.order = order
    learn = step_learner([*both_callbacks(), Looks(), CPUAmp(torch.float16, init_scale=64.), GradientAccumulation(16), GradientClip(.3)])
    truth = OptimizerTruth(learn)
    with warned() as messages: fit(learn)
    assert messages==[] and len(truth.got)==2
    np.testing.assert_allclose(learn.grad_norm.df['clipped_norm'], truth.norms, rtol=1e-5)

class ClipsLate(Callback):
    "Of the order that GradientClip has, but in `after_backward`: that is before anybody reads"
    order = 11
    def after_backward(self): clip_gradients(self.model)
class ClipsInBackward(Learner):
    def _backward(self):
        super()._backward()
        clip_gradients(self.model)
class ClipsInBetween(Learner):
    def _do_grad_opt(self):
        self._with_events(self._backward, 'backward', CancelBackwardException)
        clip_gradients(self.model)
        self._with_events(self._step, 'step', CancelStepException)
        self.opt.zero_grad()

@pytest.mark.parametrize('cbs,cls,name',
                         (([ClipsLate],Learner,'ClipsLate'), ([],ClipsInBackward,'ClipsInBackward'),
                          ([],ClipsInBetween,'ClipsInBetween'), ([Composite],Learner,'Composite')),
                         ids=lambda o: str(o)[:20])
def test_everybody_who_acts_before_is_named(cbs, cls, name):
    learn = step_learner([*both_callbacks(), *(c() for c in cbs)], cls=cls)
    with warned() as messages:
        fit(learn)
        learn.grad_norm.record
    assert len(messages)==1 and name in messages[0]

# --- steps and batches that somebody drops

def zero_in_place(learn): learn.opt.zero_grad()
def set_to_none(learn): learn.model.zero_grad(set_to_none=True)
def zero_by_hand(learn):
    for p in learn.model.parameters(): p.grad.zero_()

dropped = [(event,exc,clear,order) for event in ('before_step','after_backward')
           for exc in (CancelBatchException,CancelFitException,CancelEpochException)
           for clear in (zero_in_place,set_to_none,zero_by_hand) for order in (-30,0,12)]
dropped += [('before_step',CancelStepException,clear,order) for clear in (leave_gradients,zero_in_place,set_to_none) for order in (-30,0,12)]
dropped += [('before_step',exc,leave_gradients,order) for exc in (CancelFitException,CancelTrainException) for order in (0,12)]

@pytest.mark.parametrize('event,exc,clear,order', dropped, ids=lambda o: getattr(o, '__name__', o))
def test_dropped_step(event, exc, clear, order):
    "The step that somebody drops is the one to see: a row with its norm, `skipped`"
    if event=='after_backward' and order==12: order = 10   # after 10.5 nothing was read there
    cb = Dropper(event, exc, clear, order)
    learn = step_learner([*both_callbacks(), cb], model=small_linear(), dls=vector_batches(scale={2:1000}))
    truth = OptimizerTruth(learn)
    fit(learn)
    d,rows = learn.grad_norm.df,learn.grad_stats.df
    assert d['iteration'].tolist()==d['step'].tolist()==list(range(len(d))) and d['skipped'].tolist()==[i==2 for i in range(len(d))]
    np.testing.assert_allclose(d.loc[2,'norm'], cb.dropped[0], rtol=1e-5)
    np.testing.assert_allclose(d.query('~skipped')['norm'], truth.norms, rtol=1e-5)
    assert rows[rows['iteration']==2]['skipped'].all() and rows.groupby('iteration').size().tolist()==[3]*len(d)
    check_against_optimizer(learn, truth)

@pytest.mark.parametrize('kind', ('output','param'))
def test_dropped_step_is_counted_alike(kind):
    "Each callback alone numbers its steps as the other"
    learn = step_learner([GradStatsCallback(kind), Dropper('before_step', CancelBatchException, zero_in_place, 0)],
                         model=small_linear(), dls=vector_batches(scale={1:1000}))
    fit(learn)
    d = learn.grad_stats.df
    assert d.groupby('step')['skipped'].first().tolist()==[False,True,False,False]

class OwnAccumulation(Callback):
    "Every third batch steps; what the others leave goes into it"
    def __init__(self, order, act=None): self.order,self.act = order,act
    def before_step(self):
        if self.act: self.act(self.learn.model)
        if (self.iter+1)%3: raise CancelBatchException('accumulates')

@pytest.mark.parametrize('act', (None, clip_gradients, add_noise))
@pytest.mark.parametrize('order', (0, 12))
def test_a_batch_that_accumulates_is_no_attempt(order, act):
    "Gradients that are kept go into the next step, whatever was done to them meanwhile"
    learn = step_learner([*both_callbacks(), OwnAccumulation(order, act)], dls=vector_batches(6))
    truth = OptimizerTruth(learn)
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
    learn = step_learner([*both_callbacks(), Own()])
    truth = OptimizerTruth(learn)
    fit(learn)
    assert not learn.grad_norm.df['skipped'].any()
    check_against_optimizer(learn, truth)

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
    learn = step_learner([*both_callbacks(norm=dict(update_every=1)), *([cb()] if cb else [])])
    truth = OptimizerTruth(learn)
    with warned() as messages: fit(learn)
    assert not any('moved' in m for m in messages)
    np.testing.assert_allclose(learn.grad_norm.df['update_norm'], truth.moved, rtol=1e-3)

@pytest.mark.parametrize('cb', (BackInStep, ByData))
def test_update_of_moved_weights(cb):
    "What the optimizer moved cannot be told from what others moved: NaN, and a sentence"
    learn = step_learner([*both_callbacks(norm=dict(update_every=1)), cb()])
    learn.create_opt()
    with warned() as messages: fit(learn)
    assert learn.grad_norm.df['update_norm'].isna().all() and learn.grad_norm.by('param')['update_norm'].isna().all()
    assert sum('Weights were moved' in m for m in messages)==1

def test_weights_that_move_in_forward():
    "`Embedding(max_norm=)` renorms its weights in forward: nothing to say of it, and the update is the optimizer's"
    class Emb(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.e,self.h = nn.Embedding(10,6, max_norm=1.),nn.Linear(6,3)
        def forward(self, x): return self.h(self.e(x).mean(1))
    x = torch.randint(10, (32,4), generator=torch.Generator().manual_seed(0))
    learn = step_learner(both_callbacks(norm=dict(update_every=1)), model=Emb(), dls=loaders(x, torch.arange(32)%3, 8))
    truth = OptimizerTruth(learn)
    with warned() as messages: fit(learn)
    assert messages==[]
    np.testing.assert_allclose(learn.grad_norm.df['update_norm'], truth.moved, rtol=1e-4)

def test_weights_that_move_after_the_step():
    "A clamp in `after_step` (WGAN) is no update of the optimizer's"
    class Clamp(Callback):
        def after_step(self):
            for p in self.learn.model.parameters(): p.data.clamp_(-.05,.05)
    learn = step_learner([*both_callbacks(norm=dict(update_every=1)), Clamp()])
    truth = OptimizerTruth(learn)
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.df['update_norm'], truth.moved, rtol=1e-4)
