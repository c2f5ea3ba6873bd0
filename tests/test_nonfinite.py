"A NaN is found whichever callback saw it, and wrong arguments are told by their name."
import warnings
import numpy as np,pandas as pd,pytest
from fastai.basics import Callback,Learner,SGD,set_seed
from torch import nn
from fastai_gradstats import GradNormCallback,GradRecord,GradStatsCallback,as_record,compare,diagnose,digits,grad_along_ray,per_sample_norms
import math,torch
from fastai.basics import *
from helpers.callbacks import ByRows
from helpers.models import FunctionNet
from helpers.records import calm_steps
from helpers.training import fit,image_learner,linear_classifier,step_learner,vector_batches,vector_learner

class BreaksAt(Callback):
    "At iteration `at`, before forward, something is no longer finite"
    def __init__(self, at, do): self.at,self.do = at,do
    def before_batch(self):
        if self.train_iter==self.at and self.training: self.do(self.learn)

def nan_weight(i):
    def _f(learn): learn.model[i].weight.data[0,0] = np.nan
    return _f

def inf_batch(learn): learn.xb = (learn.xb[0]/0.,)

def run_broken(do, *cbs, at=3):
    set_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64,32), nn.ReLU(), nn.Linear(32,32), nn.ReLU(), nn.Linear(32,10))
    learn = Learner(digits(), model, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, cbs=[*cbs, BreaksAt(at, do)])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .1)
    return learn

def finding(o, rule='non_finite'):
    f = diagnose(o)
    return f[f['rule']==rule].iloc[0]

@pytest.fixture(scope='module')
def normed(): return run_broken(nan_weight(3), GradNormCallback())

def test_norms_alone(normed):
    n = len(normed.grad_norm.steps)
    assert not diagnose(normed).ok
    r = finding(normed)
    assert (r['severity'],r['tensor'],r['iterations'])==('error','3.weight',f'3 to {n-1} ({n-3})')
    assert r['evidence']==f'gradient not finite from iteration 3 on, in {n-3} of {n} steps; its weights were not finite before this step'
    ok = normed.grad_norm.norms[:3]
    assert normed.grad_norm.sentence()==f'Gradient norm {np.median(ok):.2g} (median of 3 finite of {n} steps), largest {max(ok):.2g}, not finite in {n-3}.'

def test_both_callbacks():
    learn = run_broken(nan_weight(3), GradNormCallback(), GradStatsCallback())
    n = len(learn.grad_norm.steps)
    r = finding(learn)
    assert (r['severity'],r['tensor'])==('error','3') and 'in forward between 1 and 3' in r['evidence'] and 'in the steps' not in r['evidence']
    assert f'largest {max(learn.grad_norm.norms[:3]):.2g}, not finite in {n-3}.' in as_record(learn).sentence()

def test_suggest_clip(normed):
    n = len(normed.grad_norm.steps)
    with pytest.warns(UserWarning, match=f'{n-3} of {n} norms are not finite') as w: c = normed.grad_norm.suggest_clip(.5)
    assert len(w)==1 and c.left_out==n-3 and f'left_out={n-3}' in repr(c)
    assert c.max_norm==float(f'{np.median(normed.grad_norm.norms[:3]):.2g}')
    assert c.share==np.mean(np.array(normed.grad_norm.norms[:3])>c.max_norm)
    with pytest.raises(ValueError, match='diagnose'): run_broken(nan_weight(1), GradNormCallback(), at=0).grad_norm.suggest_clip()

def test_overflow_is_no_error():
    "A gradient scaler skipped the two steps that were not finite"
    norm = np.r_[np.inf, np.inf, np.arange(1., 19)]
    rec = GradRecord(steps=calm_steps(norm=norm, nonfinite=(norm==np.inf)*5, skipped=norm==np.inf))
    f = diagnose(rec)
    assert f.ok and 'non_finite' not in set(f['rule'])
    assert rec.sentence()=='Gradient norm 9.5 (median of 18 finite of 20 steps), largest 18; 2 skipped.'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert rec.suggest_clip(.5)==(9.5,.5) and rec.suggest_clip().left_out==0

def test_no_finite_norm():
    rec = GradRecord(steps=calm_steps(norm=np.full(4, np.nan), nonfinite=1))
    assert rec.sentence()=='No finite gradient norm in 4 steps, not finite in 4.'
    assert finding(rec)['tensor']=='(all)'

@pytest.mark.parametrize('do', [inf_batch, nan_weight(1)], ids=['batch','weights'])
def test_input(do):
    "Both give the same pair, and the advice names both"
    learn = run_broken(do, GradStatsCallback())
    assert learn.grad_stats.first_nonfinite()==(3, '(input)', '1')
    assert 'batch (the data)' in finding(learn)['try'] and 'weights of 1:' in finding(learn)['try']

def test_every():
    learn = run_broken(nan_weight(3), GradStatsCallback(every=10), GradNormCallback())
    assert repr(learn.grad_stats.first_nonfinite()).startswith('not finite at iteration 10, the first looked at or kept after 0: in forward')
    assert finding(learn)['evidence'].endswith('in the steps from iteration 3 on')
    assert 'at iteration 10, the first looked at or kept after 0, in' in finding(run_broken(nan_weight(3), GradNormCallback(every=10)))['evidence']

def test_evidence():
    "A spike says how many steps its median is of; a loss has no tensor"
    s = calm_steps(norm=np.r_[np.ones(10), 150., np.ones(20)], loss=np.r_[np.ones(10), np.full(21, 4.)])
    assert '150 times the median of the 10 steps before' in finding(GradRecord(steps=s), 'spike')['evidence']
    assert finding(GradRecord(steps=s), 'loss_rose')['tensor']=='' and 'largest norm at iteration 10' in finding(GradRecord(steps=s), 'loss_rose')['evidence']
    assert len(diagnose(GradRecord(steps=s), window=5))   # a window shorter than ten steps

def test_text(normed):
    f = diagnose(normed)
    text = str(f).replace('\n    ', ' ')
    r = finding(normed)
    assert text.splitlines()[1]==f"error, non_finite, 3.weight, iterations {r['iterations']}: {r['evidence']}; try: {r['try']}"
    assert text.splitlines()[-1].startswith('not checked: ') and 'depth' in text.splitlines()[-1] and '...' not in text
    assert repr(f)==str(f) and '<table' in f._repr_html_()
    two = str(diagnose(compare({'a':normed, 'b':GradRecord(steps=calm_steps(norm=np.ones(20)))}))).replace('\n    ', ' ')
    assert 'error, non_finite, a, 3.weight' in two and all(o in two.splitlines()[-1] for o in ('depth (a)', 'depth (b)'))
    assert 'nothing was recorded' in str(diagnose(GradRecord())).splitlines()[0]
    calm = str(diagnose(GradRecord(steps=calm_steps(norm=np.ones(20))))).splitlines()
    assert 'nothing wrong found' in calm[0] and calm[1].startswith('not checked: ')
    assert repr(f[:1]) in str(f) and not f[:1].ok and not f[f['severity']=='error'].ok and repr(f.copy())==str(f) and type(f[['rule','evidence']]) is pd.DataFrame
    for d in (f[:1], f[['rule','evidence']], f[f['severity']=='error'], f.copy(), f.drop(columns='try'), f.reset_index()):
        assert len(repr(d)) and 'non_finite' in d.to_string()
    del f['evidence']
    assert 'non_finite' in repr(f)

@pytest.fixture(scope='module')
def stats(): return run_broken(lambda learn: None, GradStatsCallback())

@pytest.mark.parametrize('call,says',
                         [(lambda l: diagnose(l, factor='x'), 'factor: a number'),
                          (lambda l: diagnose(l, window=-3), 'window: a whole number'),
                          (lambda l: diagnose(l, dead=5), 'dead: a number from 0 to 1'),
                          (lambda l: l.grad_stats.top(3, 'foo'), 'stat: accepted are .*max_abs'),
                          (lambda l: l.grad_stats.suggest_clip('a'), 'q: a number'),
                          (lambda l: l.grad_stats.suggest_clip(), 'GradNormCallback'),
                          (lambda l: grad_along_ray(l.model, [1]), 'learn: a Learner'),
                          (lambda l: grad_along_ray(l, 'a'), 'scales: '),
                          (lambda l: per_sample_norms(l.model, 3), 'learn: a Learner'),
                          (lambda l: GradRecord.load(5), 'folder: a path'),
                          (lambda l: l.grad_stats.by('module'), 'GradNormCallback'),
                          (lambda l: l.grad_stats.elasticity(), 'GradNormCallback')])
def test_errors(stats, call, says):
    with pytest.raises((TypeError,ValueError), match=says) as e: call(stats)
    assert '\n' not in str(e.value)

def test_select_of_nothing(stats):
    "As in pandas: what is not there is no row, be it that a frozen layer had no gradient."
    assert len(stats.grad_stats.select(name='zzz').df)==0

# --- between which modules it broke

class MakesNaN(nn.Module):
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
        ls[k-1].append(MakesNaN(where))
        return nn.Sequential(nn.Flatten(), *ls)
    got = fit(image_learner(model, GradStatsCallback(), n=32)).grad_stats.first_nonfinite()
    names = [f'{i}.0' for i in range(1,7)]+['(loss)']
    a,b = names[k-1:k+1]
    assert got==((0, a, b) if where=='forward' and k<6 else (0, b, a))
    assert got.where==('forward' if where=='forward' and k<6 else 'backward')

def test_first_nonfinite_of_the_input():
    learn = image_learner(linear_classifier, GradStatsCallback(), n=32)
    learn.dls.train.dataset[3][0][:] = torch.inf
    assert fit(learn).grad_stats.first_nonfinite()==(0, '(input)', '1')
    assert fit(image_learner(linear_classifier, GradStatsCallback())).grad_stats.first_nonfinite() is None

@pytest.mark.parametrize('exc', (CancelBatchException, CancelFitException))
@pytest.mark.parametrize('order', (0, 20))
@pytest.mark.parametrize('kind', ('both', 'output'))
def test_nan_that_is_skipped_after_the_loss(exc, order, kind):
    "No gradient came of it: it is a break of the forward pass, with its place"
    class SkipNaN(Callback):
        def after_loss(self):
            if self.training and not torch.isfinite(self.loss): raise exc('NaN')
    SkipNaN.order = order
    learn = step_learner([GradStatsCallback(kind), GradNormCallback(), SkipNaN()], dls=vector_batches(scale={2:math.nan}))
    fit(learn)
    assert learn.grad_stats.breaks==[(0, 0, 2, '(input)', '0')]
    found = learn.grad_stats.first_nonfinite()
    assert (found.iteration,found.after,found.before,found.where)==(2, '(input)', '0', 'forward')
    assert not diagnose(learn).ok

# --- -inf by design

class MasksOneClass(nn.Module):
    "Masks one class"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-.5, .5, 24).view(8,3))
        self.register_buffer('off', torch.tensor([False,False,True]))
    def forward(self, x): return (x@self.w).masked_fill(self.off, -torch.inf)
class CanTurnBad(nn.Module):
    "Passes on; forward or backward turns bad when told to"
    now = None
    def forward(self, x):
        x = x*1.
        if self.now=='backward' and x.requires_grad: x.register_hook(lambda g: g*torch.nan)
        return x*torch.nan if self.now=='forward' else x*torch.inf if self.now=='inf' else x
class TurnsBad(Callback):
    order = 20
    def __init__(self, at, what): self.at,self.what = at,what
    def before_batch(self): self.learn.model[1].now = self.what if self.train_iter==self.at else None

def masked_net(): return nn.Sequential(nn.Linear(6,8), CanTurnBad(), nn.Linear(8,8), nn.Tanh(), MasksOneClass())
def masked_first_net():
    return nn.Sequential(FunctionNet(lambda s,x: s.s(x@s.w).softmax(1), s=MasksOneClass(),
                                     w=nn.Parameter(torch.eye(6)[:,:6]@torch.ones(6,8)/6)),
                         CanTurnBad(), nn.Linear(3,3))
def two_class_loss(o, y): return F.cross_entropy(o, y%2)

@pytest.mark.parametrize('cls', (GradStatsCallback,ByRows))
@pytest.mark.parametrize('what', (None,'forward','backward','inf'))
@pytest.mark.parametrize('make', (masked_net,masked_first_net))
def test_masks(make, what, cls):
    "A mask is no break, before or after the module that breaks."
    learn = fit(vector_learner(make, [gcb := cls(), TurnsBad(2, what)], loss=two_class_loss if make is masked_net else F.cross_entropy))
    f = gcb.first_nonfinite()
    assert len(gcb.record.breaks)==int(what in ('forward','inf'))
    if what is None: return   # rows of a mask's own gradient are finite
    near,far = ('2','0') if make is masked_net else ('2','0')
    if what=='backward': assert f.where=='backward'
    else: assert f.where=='forward' and f[2]==near
