"Beside other callbacks and other Learners: training is as without ours, and ours come and go."
import io
from contextlib import redirect_stdout
from copy import deepcopy
import numpy as np,pytest,torch
from fastai.basics import *
from fastai.callback.all import *
from fastai_gradstats import GradNormCallback,GradStatsCallback
from helpers.callbacks import CPUAmp
from helpers.oracles import GradSpy,OptimizerTruth,check_against_optimizer,check_against_spy
from helpers.training import both_callbacks,dropout_convnet,fit,image_learner,linear_classifier,step_learner

# --- fastai's callbacks, and others

class EMAInMidFit(Callback):
    "Keeps a running mean of the weights in a copy, made in mid-fit"
    def after_batch(self):
        if not self.training: return
        if not hasattr(self.learn, 'avg_model'): self.learn.avg_model = deepcopy(self.model)
        with torch.no_grad():
            for e,p in zip(self.learn.avg_model.parameters(), self.model.parameters()): e.lerp_(p, .1)
        self.learn.avg_model(self.x).sum().backward()   # hooks that had come along would add rows

fastai_companions = dict(
    none=list,
    mixup=MixUp,
    cutmix=CutMix,
    channels_last=ChannelsLast,
    bn_freeze=BnFreeze,
    csv=CSVLogger,
    clip=lambda: GradientClip(.1),
    accumulate=lambda: GradientAccumulation(32),
    save=lambda: SaveModelCallback(every_epoch=False),
    ema=EMAInMidFit,
    amp=lambda: CPUAmp(init_scale=1024.),
    bf16=lambda: CPUAmp(torch.bfloat16, enabled=False),
    fetch=lambda: FetchPredsCallback(cbs=[]),
    reduce_lr=lambda: ReduceLROnPlateau(patience=1),
    tracker=lambda: TrackerCallback(),
    show_graph=ShowGraphCallback,
    schedule=lambda: ParamScheduler({'lr':SchedCos(.1,.01)}))

def losses_and_weights(learn): return [l.item() for l in learn.recorder.losses],[t.clone() for t in learn.model.state_dict().values()]

def check_beside(make, path, steps=4, bar=False):
    "Two epochs with the callbacks that `make` gives, without and with ours: the same bits, and the right parameter rows"
    res = []
    for ours in (False,True):
        spy = GradSpy()
        learn = image_learner(cbs=[*(both_callbacks() if ours else []), *L(make()), spy], opt_func=Adam, loss_func=CrossEntropyLossFlat())
        learn.path = path
        with redirect_stdout(io.StringIO()): learn.fit(2) if bar else fit(learn, 2)
        res.append(losses_and_weights(learn))
    assert res[0][0]==res[1][0]
    assert all(torch.equal(a, b) for a,b in zip(res[0][1], res[1][1], strict=True))
    check_against_spy(learn, spy)
    assert len(learn.grad_norm.norms)==2*steps and len(learn.grad_stats.stats)==8

@pytest.mark.parametrize('name', fastai_companions)
def test_companion(name, tmp_path):
    check_beside(fastai_companions[name], tmp_path, steps={'accumulate':2}.get(name, 4), bar=name=='show_graph')   # it draws on the bar

def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    check_beside(lambda: TensorBoardCallback(tmp_path, trace_model=False, log_preds=False), tmp_path)

def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    from fastai.callback.wandb import WandbCallback
    monkeypatch.chdir(tmp_path)
    # fastcore's refuses numbers (2.2), which stops fastai's callback (2.8.12) in any fit; fastai 2.7 does not use it
    monkeypatch.setattr('fastai.callback.wandb.init_args', lambda o: {}, raising=False)
    with wandb.init(mode='offline', project='test', dir=tmp_path): check_beside(lambda: WandbCallback(log_preds=False, log_model=False), tmp_path)

def test_no_recorder():
    learn = image_learner(linear_classifier, both_callbacks())
    learn.remove_cbs(learn.cbs.filter(lambda c: isinstance(c, (Recorder,ProgressCallback))))
    learn.fit(1)
    assert len(learn.grad_norm.norms)==4

def test_default_callbacks(monkeypatch):
    "In `defaults.callbacks`, so in every Learner."
    monkeypatch.setattr(defaults, 'callbacks', [*defaults.callbacks, GradStatsCallback, GradNormCallback])
    a,b = (fit(image_learner()) for _ in range(2))
    assert len(a.grad_norm.norms)==len(b.grad_norm.norms)==4

# --- ours are added, taken off and switched off

class PredictsInMidFit(Callback):
    "Takes our callbacks off in mid-fit for a prediction, as FetchPredsCallback and WandbCallback do"
    def after_epoch(self):
        with self.learn.removed_cbs(L(c for c in self.learn.cbs if isinstance(c, (GradStatsCallback,GradNormCallback)))), self.learn.no_logging():
            self.learn.get_preds(inner=True)

def test_taken_off_in_mid_fit():
    spy = GradSpy()
    learn = fit(image_learner(cbs=[*both_callbacks(), spy, PredictsInMidFit()]), 3)
    check_against_spy(learn, spy)
    assert learn.grad_stats.df['epoch'].unique().tolist()==[0,1,2]
    assert (learn.grad_stats.df['fit']==0).all()

class DoesAt(Callback):
    "Does something to the callbacks at one iteration"
    def __init__(self, do, event='after_batch', it=1, order=0): self.do,self.it,self.order = do,it,order; setattr(self, event, self.act)
    def act(self):
        if self.learn.train_iter==self.it+1 or self.learn.iter==self.it and not hasattr(self, 'done'):
            self.done = True
            self.do(self.learn)

def take_off_and_on(learn):
    with learn.removed_cbs(learn.cbs.filter(lambda c: isinstance(c, (GradStatsCallback,GradNormCallback)))): pass
def switch_off(learn): learn.grad_stats.run = False
def add_callbacks(learn): learn.add_cbs(both_callbacks())

@pytest.mark.parametrize('order', (0, 20))
def test_taken_off_and_put_back(order):
    learn = step_learner([*both_callbacks(), DoesAt(take_off_and_on, order=order)])
    truth = OptimizerTruth(learn)
    fit(learn, 2)
    assert learn.grad_stats.df['iteration'].unique().tolist()==list(range(8)) and (learn.grad_stats.df['fit']==0).all()
    check_against_optimizer(learn, truth)

@pytest.mark.parametrize('order', (0, 20))
def test_switched_off(order):
    "`run=False`: what follows is not recorded, nothing waits, no hook stays; fastai switches it on again for the next fit"
    learn = step_learner([*both_callbacks(), DoesAt(switch_off, order=order)])
    fit(learn)
    assert learn.grad_stats.df.groupby('iteration').size().to_dict()=={0:6, 1:6}
    assert learn.grad_norm.df['iteration'].tolist()==[0,1,2,3]
    assert not any(m._forward_hooks for m in learn.model.modules())
    fit(learn, cbs=[])
    assert learn.grad_stats.df['iteration'].nunique()>2

@pytest.mark.parametrize('event', ('after_batch','after_epoch'))
def test_added_in_mid_fit(event):
    "Recorded from then on, as fit 0 with its facts"
    learn = step_learner([DoesAt(add_callbacks, event, it=1 if event=='after_batch' else 3)])
    fit(learn, 2)
    n = {'after_batch':6, 'after_epoch':4}[event]
    assert learn.grad_norm.df['iteration'].tolist()==list(range(n)) and (learn.grad_stats.df['fit']==0).all()
    assert [f['fit'] for f in learn.grad_stats.record.facts]==[0]
    assert not any(m._forward_hooks for m in learn.model.modules()) and 'step' not in learn.opt.__dict__

# --- several

def test_several():
    "Learners at once, callbacks with other arguments on one learner."
    a,b = image_learner(linear_classifier, both_callbacks()),image_learner(dropout_convnet, both_callbacks())
    fit(a); fit(b); fit(a)
    assert len(a.grad_stats.stats)==8 and len(b.grad_stats.stats)==4
    outs,pars = GradStatsCallback('output'),GradStatsCallback('param', every=2, include='6')
    learn = fit(image_learner(cbs=[outs,pars,(one := GradNormCallback()),(two := GradNormCallback(every=2)),(spy := GradSpy())]))
    assert set(outs.df['kind'])=={'output'} and set(pars.df['name'])=={'6.weight','6.bias'} and pars.df['step'].unique().tolist()==[0,2]
    np.testing.assert_allclose(one.norms, spy.norms, rtol=1e-5)
    np.testing.assert_allclose(two.norms, spy.norms[::2], rtol=1e-5)

def test_one_callback_two_learners():
    a,b = image_learner(linear_classifier),image_learner(linear_classifier)
    cbs = both_callbacks()
    fit(a, cbs=cbs)
    with pytest.raises(ValueError, match='another Learner'): fit(b, cbs=cbs)
    for c in cbs: c.reset()
    fit(b, cbs=cbs)
    assert len(cbs[1].norms)==4
