"Right in every way people train: each case against autograd, the gradients as the optimizer got them, or the same run without us."
import io,signal,subprocess,sys
from contextlib import redirect_stdout

import numpy as np,pytest,torch
from fastai.basics import *
from fastai.callback.all import *
from fastai.vision.learner import *
from fastai.vision.augment import *
from torch import nn
from copy import deepcopy

from fastai_gradstats import GradNormCallback,GradStatsCallback
from fastai_gradstats.engine import Engine
from oracles import Spy,Twin,check_outputs,compare,fit

del test,test_close,test_eq,test_eq_type,test_fail,test_fig_exists,test_is,test_ne,test_set,test_shuffled,test_sig,test_stdout,test_warns   # fastcore's, which fastai exports and pytest would collect

def data(n=64, bs=16, size=8, valid=16, c=10):
    "Random pictures in random classes"
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(n+valid,3,size,size, generator=g),torch.randint(c, (n+valid,), generator=g)
    return DataLoaders(*(DataLoader(L(zip(x[s],y[s])), bs=bs) for s in (slice(n),slice(n,None))))

def convnet(): return nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(.2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32,10))
def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(192,10))

def learner(model=convnet, cbs=None, opt_func=SGD, loss_func=None, cls=Learner, **kw):
    set_seed(0)
    return cls(data(**kw), model(), loss_func=loss_func or nn.CrossEntropyLoss(), opt_func=opt_func, cbs=cbs, lr=.01)

def both(): return [GradStatsCallback(), GradNormCallback()]

def check_params(learn, spy, steps=None):
    "Every parameter row and norm equals what `spy` copied; `steps` says which of the callback's steps those were"
    df = learn.grad_stats.select(kind='param').df
    steps = range(len(spy.grads)) if steps is None else steps
    for s,gs in zip(steps, spy.grads):
        rows = df[df['step']==s]
        assert list(rows['name'])==list(gs)
        for _,r in rows.iterrows(): compare(r, gs[r['name']])
    assert df['step'].nunique()==len(spy.grads)
    norms = learn.grad_norm.df.set_index('step')['norm']
    np.testing.assert_allclose(norms[list(steps)], spy.norms, rtol=1e-5)

# --- mixed precision. No GPU here: torch's CPU scaler scales and skips as CUDA's does

class CPUAmp(MixedPrecision):
    "fastai's MixedPrecision hard-codes 'cuda'; the same on a CPU"
    def __init__(self, dtype=torch.float32, **kwargs): super().__init__(); self.dtype,self.kwargs = dtype,kwargs
    def before_fit(self):
        self.autocast = torch.autocast('cpu', self.dtype, enabled=self.dtype!=torch.float32)
        self.learn.scaler,self.scales = torch.amp.GradScaler('cpu', **self.kwargs),L()

def test_scale_is_removed():
    "A scale that is a power of two, and grows and backs off, changes no number of either kind."
    a = fit(learner(cbs=[*both(), CPUAmp(init_scale=2.**16, growth_interval=2)]))
    b = fit(learner(cbs=both()))
    for f in ('grad_stats','grad_norm'):
        for c in (da := getattr(a, f).df): np.testing.assert_array_equal(da[c], getattr(b, f).df[c], err_msg=c)

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_autocast(dtype):
    spy = Spy()
    learn = fit(learner(linear, [*both(), CPUAmp(dtype, init_scale=1024.), spy], bs=16, n=16))
    x,y = first(learn.dls.train)
    set_seed(0)
    data()
    model = linear()
    with torch.autocast('cpu', dtype):
        out = model(x)
        loss = nn.CrossEntropyLoss()(out.float(), y)
    g, = torch.autograd.grad(loss*1024, out)   # in half precision, scaled: as backward saw it
    compare(learn.grad_stats.select(kind='output').df.iloc[0], g.double().numpy()/1024)

class Overflow(Callback):
    "Breaks the loss of some iterations"
    order = 5
    def __init__(self, its): self.its = its
    def before_backward(self):
        if self.iter in self.its: self.learn.loss_grad = self.loss_grad*torch.inf

def test_overflow():
    "An overflow is a skipped step: its rows are there, not finite and marked; the scale of the next step is another."
    learn = fit(learner(linear, [*both(), CPUAmp(init_scale=2.**16), Overflow([1])]))
    d,s = learn.grad_stats.df,learn.grad_norm.df
    assert s['skipped'].tolist()==[False,True,False,False] and s['step'].tolist()==[0,1,2,3]
    assert d.loc[d['skipped'],'iteration'].unique().tolist()==[1]
    assert (d.loc[d['iteration']==1,'nonfinite']==d.loc[d['iteration']==1,'numel']).all()
    assert (d.loc[d['iteration']!=1,'nonfinite']==0).all()
    assert s['nonfinite'].tolist()==[0,1930,0,0] and not np.isfinite(s['norm'][1])
    plain = fit(learner(linear, [*both(), Overflow([])])).grad_stats.df
    np.testing.assert_array_equal(d[d['iteration']==0]['max_abs'], plain[plain['iteration']==0]['max_abs'])
    assert np.isfinite(learn.grad_norm.df['norm'][2])

def test_overflow_of_an_accumulated_step():
    learn = fit(learner(linear, [*both(), CPUAmp(init_scale=2.**16), GradientAccumulation(32), Overflow([1])], n=128))
    d = learn.grad_stats.select(kind='output').df
    assert d['step'].tolist()==[0,0,1,1,2,2,3,3]
    assert d['skipped'].tolist()==[True]*2+[False]*6

# --- accumulation, clipping, weight decay

def test_last_group_leaks():
    "fastai steps on no incomplete group; its gradient goes into the first step of the next fit. The rows say what the optimizer got."
    spy = Spy()
    learn = learner(linear, [*both(), GradientAccumulation(32), spy], n=80)
    fit(learn); fit(learn)
    check_params(learn, spy)
    assert learn.grad_norm.df['iteration'].tolist()==[1,3,6,8]
    one = fit(learner(linear, [*both(), (alone := Spy()), GradientAccumulation(32)], n=80))
    assert learn.grad_norm.norms[2] > 1.1*one.grad_norm.norms[0]

class Clip12(Callback):
    "Somebody's own clipping"
    order = 12
    def before_step(self): nn.utils.clip_grad_norm_(self.model.parameters(), .2)

class After(Callback):
    "Norms just before the step"
    order = 2000
    def __init__(self): self.norms = []
    def before_step(self): self.norms.append(nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).item())

@pytest.mark.parametrize('clip', (lambda: GradientClip(.1), lambda: GradientClip(100.), lambda: GradientClip(.01, norm_type=float('inf')), Clip12), ids='2 2-large inf own'.split())
@pytest.mark.parametrize('opt', (SGD, partial(SGD, decouple_wd=False, wd=.1)), ids='sgd l2'.split())
def test_clipping(clip, opt):
    spy,after = Spy(),After()
    learn = fit(learner(cbs=[*both(), spy, after, clip()], opt_func=opt))
    check_params(learn, spy)
    df = learn.grad_norm.df
    np.testing.assert_allclose(df['clipped_norm'], after.norms, rtol=1e-5)
    np.testing.assert_allclose(df['norm']*df['clip_coef'], df['clipped_norm'], rtol=1e-5)
    assert len(learn.cbs)==len(fit(learn).cbs) and not any(c.order==1000 for c in learn.cbs)

@pytest.mark.parametrize('opt', (partial(Adam, wd=.1), partial(Adam, wd=.1, decouple_wd=False), partial(OptimWrapper, opt=partial(torch.optim.AdamW, weight_decay=.1))), ids='adam l2 wrapper'.split())
def test_weight_decay_is_no_gradient(opt):
    spy = Spy()
    check_params(fit(learner(cbs=[*both(), spy], opt_func=opt), 2), spy)

def test_weights_and_products():
    "Weight norm and gradient times weight are of the weights that produced the gradient; module and group norms combine."
    ws = []
    class Keep(Spy):
        def before_step(self): super().before_step(); ws.append({n:p.detach().double().numpy().copy() for n,p in self.model.named_parameters()})
    learn = fit(learner(cbs=[*both(), (spy := Keep())]))
    p = learn.grad_norm.by('param')
    for s,(gs,w) in enumerate(zip(spy.grads, ws)):
        d = p[p['step']==s].set_index('name')
        np.testing.assert_allclose(d['norm'], [np.linalg.norm(g) for g in gs.values()], rtol=1e-5)
        np.testing.assert_allclose(d['weight_norm'], [np.linalg.norm(w[n]) for n in gs], rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(d['dot'], [(w[n]*g).sum() for n,g in gs.items()], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(learn.grad_norm.df['weight_norm'], [np.sqrt(sum((o**2).sum() for o in w.values())) for w in ws], rtol=1e-5)
    for by in ('module','group'): np.testing.assert_allclose(np.sqrt((learn.grad_norm.by(by)['norm']**2).groupby(learn.grad_norm.by(by)['step']).sum()), learn.grad_norm.norms, rtol=1e-5)

def test_one_reader_equals_two():
    "GradNormCallback alone and beside GradStatsCallback, with which it shares the read."
    a,b = (fit(learner(cbs=c)).grad_norm.record for c in ([GradNormCallback()], both()))
    for x,y in ((a.steps,b.steps), (a.by('param'),b.by('param'))):
        for c in x: np.testing.assert_allclose(x[c], y[c], rtol=1e-6, atol=1e-9) if x[c].dtype.kind=='f' else np.testing.assert_array_equal(x[c], y[c])

# --- what takes part

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.never = nn.Linear(192,10),nn.Linear(192,10),nn.Linear(2,2)
        self.n = 0
    def forward(self, x):
        self.n += 1
        return (self.a if self.n%2 else self.b)(x.flatten(1))

def test_unused_parameters():
    "`grad is None`: no row. Zeros that fastai's `zero_grad` left: a row of zeros."
    learn = fit(learner(Branch, both()))
    d = learn.grad_stats.df
    assert not d['name'].astype(str).str.startswith('never').any()
    b = d[d['name']=='b.weight'].set_index('iteration')
    assert b.index.tolist()==[1,2,3] and b['zeros'].tolist()==[0,1920,0] and b['max_abs'][2]==0
    assert d[(d['name']=='b')].iteration.tolist()==[1,3]

def test_every():
    all_,some = (fit(learner(cbs=[GradStatsCallback(every=e), GradNormCallback(every=e)], n=160)) for e in (1,3))
    for n,at in (('grad_stats','iteration'),('grad_norm','step')):
        d = getattr(all_, n).df
        pd.testing.assert_frame_equal(getattr(some, n).df, d[d[at]%3==0].reset_index(drop=True), rtol=1e-6)

def test_every_with_accumulation():
    "One iteration in n for outputs, one step in n for parameters."
    d = fit(learner(linear, [GradStatsCallback(every=3), GradientAccumulation(32)], n=16*12)).grad_stats.df
    assert d.loc[d['kind']=='output','iteration'].tolist()==[0,3,6,9]
    assert d.loc[d['kind']=='param','step'].unique().tolist()==[0,3]

def test_extra_and_threshold():
    learn = fit(learner(cbs=[GradStatsCallback(threshold=.01, extra=dict(median=lambda g: g.float().abs().median())), GradNormCallback(), (spy := Spy())], n=16))
    for _,r in learn.grad_stats.select(kind='param').df.iterrows():
        compare(r, spy.grads[0][r['name']], .01)
        v = np.sort(np.abs(spy.grads[0][r['name']]).ravel())
        np.testing.assert_allclose(r['median'], v[(len(v)-1)//2], rtol=1e-6)

# --- callbacks that cancel, and exceptions

class Traced(Learner):
    "Notes what really happened"
    def _backward(self): super()._backward(); self.events.append(('backward', self.epoch, self.iter))
    def _step(self): super()._step(); self.events.append(('step', nn.utils.get_total_norm([p.grad for p in self.model.parameters()]).item()))

class Raise(Callback):
    def __init__(self, exc, event, at, order): self.exc,self.at,self.order,self.done = exc,at,order,False; setattr(self, event, self._raise)
    def _raise(self):
        if self.done or not hasattr(self.learn, 'epoch') or getattr(self.learn, 'iter', 0)<self.at: return
        self.done = True
        raise self.exc('test')

events = 'before_epoch before_train before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch after_train before_validate after_epoch'.split()
excs = [CancelBatchException, CancelBackwardException, CancelStepException, CancelTrainException, CancelEpochException, CancelFitException, KeyboardInterrupt, RuntimeError]

@pytest.mark.parametrize('order', (5, 20))
@pytest.mark.parametrize('event', events)
def test_cancel(event, order):
    "Whatever is raised wherever: rows for each backward and step that happened, none else, no hook left, and the next fit works."
    for exc in excs:
        learn = learner(linear, [*both(), Raise(exc, event, 1, order)], cls=Traced, n=48, valid=4)
        learn.events = []
        try: fit(learn, 2)
        except (Exception,KeyboardInterrupt) as e: assert isinstance(e, exc)
        assert not any(m._forward_hooks for m in learn.model.modules()) and '_do_epoch_train' not in learn.__dict__, exc
        fit(learn)
        what = f'{exc.__name__} in {event}, order {order}'
        done = [o for o in learn.events if o[0]=='backward']
        steps = [o[1] for o in learn.events if o[0]=='step']
        out = learn.grad_stats.select(kind='output').df
        assert len(out)==len(done)==out['iteration'].nunique(), what
        assert out['iteration'].is_monotonic_increasing
        s = learn.grad_norm.df
        np.testing.assert_allclose(s.loc[~s['skipped'],'norm'], steps, rtol=1e-5, err_msg=what)
        assert s['step'].tolist()==list(range(len(s))), what
        par = learn.grad_stats.select(kind='param').df
        read = s.loc[s['norm'].notna(),'step'].tolist()
        assert par['step'].unique().tolist()==read and len(par)==2*len(read), what
        assert set(par.loc[par['skipped'],'step'])<=set(s.loc[s['skipped'],'step'])

class Bomb(nn.Module):
    "Passes its input on, and fails in forward or backward when told to"
    fail = None
    def forward(self, x):
        if self.fail=='forward': raise KeyboardInterrupt
        if self.fail=='backward': x.register_hook(self.boom)
        return x
    def boom(self, g): raise KeyboardInterrupt

@pytest.mark.parametrize('where', ('forward','backward','optimizer'))
def test_interrupt(where):
    "Ctrl-C in the midst of an iteration: complete iterations stay, half ones leave no row."
    learn = learner(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192,20), Bomb(), nn.Linear(20,10)), both())
    fit(learn)
    n,k = len(learn.grad_stats.df),len(learn.grad_norm.df)
    def boom(*args): raise KeyboardInterrupt
    if where=='optimizer': learn.opt.step = boom
    else: learn.model[2].fail = where
    with pytest.raises(KeyboardInterrupt): fit(learn)
    assert not any(m._forward_hooks for m in learn.model.modules())
    assert len(learn.grad_norm.df)==k
    assert len(learn.grad_stats.df)==n + (2 if where=='optimizer' else 0)   # its backward was complete
    learn.model[2].fail = None
    if where=='optimizer': del learn.opt.step
    fit(learn)
    assert len(learn.grad_norm.df)==2*k and (learn.grad_stats.df.groupby('iteration').size()>=2).all()

class CtrlC:
    "Sends an interrupt at the `at`-th line that our callbacks and engine run"
    def __init__(self, at): self.at,self.n,self.where = at,0,None
    def __call__(self, frame, event, arg):
        if Path(frame.f_code.co_filename).name in ('callback.py','engine.py') and 'fastai_gradstats' in frame.f_code.co_filename: return self.line
    def line(self, frame, event, arg):
        self.n += event=='line'
        if self.n==self.at and self.where is None:
            self.where = f'{frame.f_code.co_name}, line {frame.f_lineno}'
            signal.raise_signal(signal.SIGINT)
        return self.line
    def __enter__(self): self.old = sys.gettrace(); sys.settrace(self)
    def __exit__(self, *args): sys.settrace(self.old)

def interrupted(at, monkeypatch):
    "Frames of a fit that is interrupted there, and where that was"
    learn,stop,close = learner(linear, both(), bs=32),CtrlC(at),Engine.close
    with monkeypatch.context() as m:
        m.setattr(Engine, 'close', lambda self: close(self) or True)   # each step goes to the record
        try:
            with stop: fit(learn)
        except KeyboardInterrupt: pass
    assert torch.is_grad_enabled(), stop.where
    frames = [d.astype({c:object for c in d.select_dtypes('category')}) for d in (learn.grad_stats.df, learn.grad_norm.df, *([learn.grad_norm.by('param')] if len(learn.grad_norm.df) else []))]
    fit(learn)
    assert learn.grad_norm.df['step'].is_monotonic_increasing and learn.grad_stats.df['iteration'].is_monotonic_increasing, stop.where
    return frames,stop

@pytest.mark.parametrize('part', [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, 7))])
def test_interrupt_anywhere(part, monkeypatch):
    "Ctrl-C at any line of ours: what was recorded is a part of what is recorded without it, and each step is whole"
    whole,stop = interrupted(0, monkeypatch)
    assert [len(o) for o in whole]==[6,2,4]
    for at in range(1+3*part, stop.n, 21):
        got,where = interrupted(at, monkeypatch)
        for a,b in zip(got, whole): pd.testing.assert_frame_equal(a, b[:len(a)], check_dtype=len(a)>0, obj=f'{at}, {where.where}: frame')
        assert set(got[0].groupby('iteration').size())<={1,3}, where.where   # a whole backward, or with its step

class Stopper(Callback):
    def after_epoch(self): raise CancelFitException('enough')

@pytest.mark.parametrize('cb,n', ((lambda: ShortEpochCallback(.5), 6), (lambda: EarlyStoppingCallback(min_delta=100, patience=1), 8), (TerminateOnNaNCallback, 8), (Stopper, 4)), ids='short early nan stop'.split())
def test_stoppers(cb, n):
    spy = Spy()
    learn = fit(learner(cbs=[*both(), spy, cb()]), 2)
    check_params(learn, spy)
    assert len(learn.grad_norm.norms)==len(learn.grad_stats.stats)==n

# --- beside other callbacks: as without us, bit for bit

class EMA(Callback):
    "Keeps a running mean of the weights in a copy, made in mid-fit"
    def after_batch(self):
        if not self.training: return
        if not hasattr(self.learn, 'avg_model'): self.learn.avg_model = deepcopy(self.model)
        with torch.no_grad():
            for e,p in zip(self.learn.avg_model.parameters(), self.model.parameters()): e.lerp_(p, .1)
        self.learn.avg_model(self.x).sum().backward()   # hooks that had come along would add rows

class TwiceBackward(Callback):
    "A penalty on the gradient itself"
    def after_loss(self):
        if self.training:
            g = torch.autograd.grad(self.loss_grad, list(self.model.parameters()), create_graph=True)
            self.learn.loss_grad = self.loss_grad + .1*sum(o.square().sum() for o in g)

companions = dict(none=list, mixup=MixUp, cutmix=CutMix, channels_last=ChannelsLast, bn_freeze=BnFreeze, csv=CSVLogger, clip=lambda: GradientClip(.1), accumulate=lambda: GradientAccumulation(32),
                  save=lambda: SaveModelCallback(every_epoch=False), ema=EMA, amp=lambda: CPUAmp(init_scale=1024.), bf16=lambda: CPUAmp(torch.bfloat16, enabled=False), fetch=lambda: FetchPredsCallback(cbs=[]),
                  reduce_lr=lambda: ReduceLROnPlateau(patience=1), tracker=lambda: TrackerCallback(), show_graph=ShowGraphCallback, schedule=lambda: ParamScheduler({'lr':SchedCos(.1,.01)}))

def state(learn): return [l.item() for l in learn.recorder.losses],[t.clone() for t in learn.model.state_dict().values()]

def beside(make, path, steps=4, bar=False):
    "Two epochs with the callbacks that `make` gives, without and with ours: the same bits, and the right parameter rows"
    res = []
    for ours in (False,True):
        spy = Spy()
        learn = learner(cbs=[*(both() if ours else []), *L(make()), spy], opt_func=Adam, loss_func=CrossEntropyLossFlat())
        learn.path = path
        with redirect_stdout(io.StringIO()): learn.fit(2) if bar else fit(learn, 2)
        res.append(state(learn))
    assert res[0][0]==res[1][0]
    assert all(torch.equal(a, b) for a,b in zip(res[0][1], res[1][1], strict=True))
    check_params(learn, spy)
    assert len(learn.grad_norm.norms)==2*steps and len(learn.grad_stats.stats)==8

@pytest.mark.parametrize('name', companions)
def test_companion(name, tmp_path): beside(companions[name], tmp_path, steps={'accumulate':2}.get(name, 4), bar=name=='show_graph')   # it draws on the bar

def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    beside(lambda: TensorBoardCallback(tmp_path, trace_model=False, log_preds=False), tmp_path)

def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    from fastai.callback.wandb import WandbCallback
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('fastai.callback.wandb.init_args', lambda o: {})   # fastcore's refuses numbers (2.2), which stops fastai's callback (2.8.12) in any fit
    with wandb.init(mode='offline', project='test', dir=tmp_path): beside(lambda: WandbCallback(log_preds=False, log_model=False), tmp_path)

# --- not training

def test_not_training(tmp_path):
    "No row and no hook from anything that does not train, and nothing lost after it."
    learn = learner(cbs=both())
    learn.path = tmp_path
    learn.validate(); learn.get_preds()
    assert len(learn.grad_stats.df)==0 and list(learn.grad_stats.df.columns)[0]=='fit'
    fit(learn)
    n = len(learn.grad_stats.df),len(learn.grad_norm.df)
    learn.validate(); learn.get_preds(); learn.get_preds(dl=learn.dls.train)
    learn.summary()
    from fastai.interpret import Interpretation
    Interpretation.from_learner(learn)
    assert (len(learn.grad_stats.df),len(learn.grad_norm.df))==n
    assert not any(m._forward_hooks for m in learn.model.modules()) and '_do_epoch_train' not in learn.__dict__
    torch.save(learn, io.BytesIO())

class Fetch(Callback):
    "Takes our callbacks off in mid-fit for a prediction, as FetchPredsCallback and WandbCallback do"
    def after_epoch(self):
        with self.learn.removed_cbs(L(c for c in self.learn.cbs if isinstance(c, (GradStatsCallback,GradNormCallback)))), self.learn.no_logging():
            self.learn.get_preds(inner=True)

def test_taken_off_in_mid_fit():
    spy = Spy()
    learn = fit(learner(cbs=[*both(), spy, Fetch()]), 3)
    check_params(learn, spy)
    assert learn.grad_stats.df['epoch'].unique().tolist()==[0,1,2]
    assert (learn.grad_stats.df['fit']==0).all()

def test_one_batch_without_fit():
    "As fastai's own notebooks do."
    learn = learner(linear)
    learn.remove_cbs(learn.cbs[:])
    learn.add_cbs(both())
    learn.create_opt()
    learn.training = True
    learn.one_batch(0, learn.dls.one_batch())
    assert len(learn.grad_stats.df)==len(learn.grad_norm.df)==0

def test_no_recorder():
    learn = learner(linear, both())
    learn.remove_cbs(learn.cbs.filter(lambda c: isinstance(c, (Recorder,ProgressCallback))))
    learn.fit(1)
    assert len(learn.grad_norm.norms)==4

def test_default_callbacks(monkeypatch):
    "In `defaults.callbacks`, so in every Learner."
    monkeypatch.setattr(defaults, 'callbacks', [*defaults.callbacks, GradStatsCallback, GradNormCallback])
    a,b = (fit(learner()) for _ in range(2))
    assert len(a.grad_norm.norms)==len(b.grad_norm.norms)==4

# --- several

def test_several():
    "Learners at once, callbacks with other arguments on one learner."
    a,b = learner(linear, both()),learner(convnet, both())
    fit(a); fit(b); fit(a)
    assert len(a.grad_stats.stats)==8 and len(b.grad_stats.stats)==4
    outs,pars = GradStatsCallback('output'),GradStatsCallback('param', every=2, include='6')
    learn = fit(learner(cbs=[outs,pars,(one := GradNormCallback()),(two := GradNormCallback(every=2)),(spy := Spy())]))
    assert set(outs.df['kind'])=={'output'} and set(pars.df['name'])=={'6.weight','6.bias'} and pars.df['step'].unique().tolist()==[0,2]
    np.testing.assert_allclose(one.norms, spy.norms, rtol=1e-5)
    np.testing.assert_allclose(two.norms, spy.norms[::2], rtol=1e-5)

def test_one_callback_two_learners():
    a,b = learner(linear),learner(linear)
    cbs = both()
    fit(a, cbs=cbs)
    with pytest.raises(ValueError, match='another Learner'): fit(b, cbs=cbs)
    for c in cbs: c.reset()
    fit(b, cbs=cbs)
    assert len(cbs[1].norms)==4

def test_second_backward():
    "A penalty on the gradient: what `autograd.grad` computes for it on the way is no gradient of the loss and has no row; the rows are those of loss and penalty together."
    def loss(learn, model):
        l = learn.loss_func(model(*learn.xb), *learn.yb)
        return l + .1*sum(o.square().sum() for o in torch.autograd.grad(l, list(model.parameters()), create_graph=True))
    spy,twin = Spy(),Twin(loss=loss)
    learn = fit(learner(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192,9), nn.Tanh(), nn.Linear(9,10)), [*both(), spy, twin, TwiceBackward()]))
    check_params(learn, spy)
    check_outputs(learn.grad_stats.df, twin, ['1','3'])
    assert len(twin.grads)==4

def test_bad_arguments_at_fit():
    with pytest.raises(ValueError, match='include.*matches no name'): fit(learner(cbs=GradStatsCallback(include='layer5')))
    with pytest.raises(ValueError, match='not part of the model'): fit(learner(cbs=GradStatsCallback(modules=[nn.Linear(1,1)])))
    learn = learner(cbs=(c := GradStatsCallback()))
    with pytest.raises(ValueError, match='twice'): fit(learn, cbs=c)

# --- leaving the house

def test_export(tmp_path, monkeypatch):
    "An exported learner loads, predicts and trains where this package cannot be imported."
    from fastai.test_utils import synth_learner
    learn = fit(synth_learner(cbs=both()))
    learn.path = tmp_path
    monkeypatch.setattr(torch.utils.data.TensorDataset, 'new_empty', lambda self: torch.utils.data.TensorDataset(torch.empty(0)), raising=False)
    learn.validate()
    learn.export('m.pkl')
    assert len(learn.grad_stats.df)
    code = """if True:
        import sys
        sys.modules['fastai_gradstats'] = None
        from fastai.learner import load_learner
        import torch
        learn = load_learner(sys.argv[1])
        x = torch.ones(4,1)
        learn.model(x).sum().backward()
        assert not any(m._forward_hooks for m in learn.model.modules())
    """
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(tmp_path/'m.pkl')], check=True)

class Export(Callback):
    "Exports the learner in mid-fit"
    def after_batch(self):
        if self.training and self.iter==1:
            b = io.BytesIO(); torch.save(self.learn, b)
            assert b'gradstats' not in b.getvalue()

def test_export_in_mid_fit():
    learn = fit(learner(cbs=[*both(), Export()]))
    assert len(learn.grad_norm.norms)==4

# --- where it broke

class Break(nn.Module):
    "Makes one NaN, in forward or in backward"
    def __init__(self, where): super().__init__(); self.where = where
    def forward(self, x):
        bad = torch.zeros_like(x).index_fill_(1, torch.tensor([0]), torch.nan)
        if self.where=='forward': return x+bad
        x = x.clone()
        if x.requires_grad: x.register_hook(lambda g: g+bad)
        return x

@pytest.mark.parametrize('k', range(1,7))
@pytest.mark.parametrize('where', ('forward','backward'))
def test_first_nonfinite(k, where):
    "The NaN is made after module k of 6: in forward it reaches k+1 first, in backward k."
    def model():
        ls = [nn.Sequential(nn.Linear(192 if i==0 else 10, 10), nn.Tanh()) for i in range(6)]
        ls[k-1].append(Break(where))
        return nn.Sequential(nn.Flatten(), *ls)
    got = fit(learner(model, GradStatsCallback(), n=32)).grad_stats.first_nonfinite()
    names = [f'{i}.0' for i in range(1,7)]+['(loss)']
    a,b = names[k-1:k+1]
    assert got==((0, a, b) if where=='forward' and k<6 else (0, b, a))
    assert got.where==('forward' if where=='forward' and k<6 else 'backward')

def test_first_nonfinite_of_the_input():
    learn = learner(linear, GradStatsCallback(), n=32)
    learn.dls.train.dataset[3][0][:] = torch.inf
    assert fit(learn).grad_stats.first_nonfinite()==(0, '(input)', '1')
    assert fit(learner(linear, GradStatsCallback())).grad_stats.first_nonfinite() is None
