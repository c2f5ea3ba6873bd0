"A NaN is found whichever callback saw it, and wrong arguments are told by their name."
import warnings
import numpy as np,pandas as pd,pytest
from fastai.basics import Callback,Learner,SGD,set_seed
from torch import nn

from fastai_gradstats import GradNormCallback,GradRecord,GradStatsCallback,as_record,compare,diagnose,digits,grad_along_ray,per_sample_norms

class Breaks(Callback):
    "At iteration `at`, before forward, something is no longer finite"
    def __init__(self, at, do): self.at,self.do = at,do
    def before_batch(self):
        if self.train_iter==self.at and self.training: self.do(self.learn)

def nan_weight(i):
    def _f(learn): learn.model[i].weight.data[0,0] = np.nan
    return _f

def inf_batch(learn): learn.xb = (learn.xb[0]/0.,)

def run(do, *cbs, at=3):
    set_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64,32), nn.ReLU(), nn.Linear(32,32), nn.ReLU(), nn.Linear(32,10))
    learn = Learner(digits(), model, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, cbs=[*cbs, Breaks(at, do)])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .1)
    return learn

def row(o, rule='non_finite'):
    f = diagnose(o)
    return f[f['rule']==rule].iloc[0]

@pytest.fixture(scope='module')
def normed(): return run(nan_weight(3), GradNormCallback())

def test_norms_alone(normed):
    n = len(normed.grad_norm.steps)
    assert not diagnose(normed).ok
    r = row(normed)
    assert (r['severity'],r['tensor'],r['iterations'])==('error','3.weight',f'3 to {n-1} ({n-3})')
    assert r['evidence']==f'gradient not finite from iteration 3 on, in {n-3} of {n} steps; its weights were not finite before this step'
    ok = normed.grad_norm.norms[:3]
    assert normed.grad_norm.sentence()==f'Gradient norm {np.median(ok):.2g} (median of 3 finite of {n} steps), largest {max(ok):.2g}, not finite in {n-3}.'

def test_both_callbacks():
    learn = run(nan_weight(3), GradNormCallback(), GradStatsCallback())
    n = len(learn.grad_norm.steps)
    r = row(learn)
    assert (r['severity'],r['tensor'])==('error','3') and 'in forward between 1 and 3' in r['evidence'] and 'in the steps' not in r['evidence']
    assert f'largest {max(learn.grad_norm.norms[:3]):.2g}, not finite in {n-3}.' in as_record(learn).sentence()

def test_suggest_clip(normed):
    n = len(normed.grad_norm.steps)
    with pytest.warns(UserWarning, match=f'{n-3} of {n} norms are not finite') as w: c = normed.grad_norm.suggest_clip(.5)
    assert len(w)==1 and c.left_out==n-3 and f'left_out={n-3}' in repr(c)
    assert c.max_norm==float(f'{np.median(normed.grad_norm.norms[:3]):.2g}')
    assert c.share==np.mean(np.array(normed.grad_norm.norms[:3])>c.max_norm)
    with pytest.raises(ValueError, match='diagnose'): run(nan_weight(1), GradNormCallback(), at=0).grad_norm.suggest_clip()

def steps(**cols):
    n = len(cols['norm'])
    return pd.DataFrame(dict(fit=0, phase=pd.Categorical(['fit']*n, ['fit','lr_find']), epoch=0, iteration=np.arange(n), step=np.arange(n), lr=.1, loss=1., bs=64, norm=1., clip_coef=1.,
                             clipped_norm=1., weight_norm=10., nonfinite=0, skipped=False)|cols)

def test_overflow_is_no_error():
    "A gradient scaler skipped the two steps that were not finite"
    norm = np.r_[np.inf, np.inf, np.arange(1., 19)]
    rec = GradRecord(steps=steps(norm=norm, nonfinite=(norm==np.inf)*5, skipped=norm==np.inf))
    f = diagnose(rec)
    assert f.ok and 'non_finite' not in set(f['rule'])
    assert rec.sentence()=='Gradient norm 9.5 (median of 18 finite of 20 steps), largest 18; 2 skipped.'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert rec.suggest_clip(.5)==(9.5,.5) and rec.suggest_clip().left_out==0

def test_no_finite_norm():
    rec = GradRecord(steps=steps(norm=np.full(4, np.nan), nonfinite=1))
    assert rec.sentence()=='No finite gradient norm in 4 steps, not finite in 4.'
    assert row(rec)['tensor']=='(all)'

@pytest.mark.parametrize('do', [inf_batch, nan_weight(1)], ids=['batch','weights'])
def test_input(do):
    "Both give the same pair, and the advice names both"
    learn = run(do, GradStatsCallback())
    assert learn.grad_stats.first_nonfinite()==(3, '(input)', '1')
    assert 'batch (the data)' in row(learn)['try'] and 'weights of 1:' in row(learn)['try']

def test_every():
    learn = run(nan_weight(3), GradStatsCallback(every=10), GradNormCallback())
    assert repr(learn.grad_stats.first_nonfinite()).startswith('not finite at iteration 10, the first looked at or kept after 0: in forward')
    assert row(learn)['evidence'].endswith('in the steps from iteration 3 on')
    assert 'at iteration 10, the first looked at or kept after 0, in' in row(run(nan_weight(3), GradNormCallback(every=10)))['evidence']

def test_evidence():
    "A spike says how many steps its median is of; a loss has no tensor"
    s = steps(norm=np.r_[np.ones(10), 150., np.ones(20)], loss=np.r_[np.ones(10), np.full(21, 4.)])
    assert '150 times the median of the 10 steps before' in row(GradRecord(steps=s), 'spike')['evidence']
    assert row(GradRecord(steps=s), 'loss_rose')['tensor']=='' and 'largest norm at iteration 10' in row(GradRecord(steps=s), 'loss_rose')['evidence']
    assert len(diagnose(GradRecord(steps=s), window=5))   # a window shorter than ten steps

def test_text(normed):
    f = diagnose(normed)
    text = str(f).replace('\n    ', ' ')
    r = row(normed)
    assert text.splitlines()[0]==f"error, non_finite, 3.weight, iterations {r['iterations']}: {r['evidence']}; try: {r['try']}"
    assert text.splitlines()[-1].startswith('not checked: ') and 'depth' in text.splitlines()[-1] and '...' not in text
    assert repr(f)==str(f) and '<table' in f._repr_html_()
    two = str(diagnose(compare({'a':normed, 'b':GradRecord(steps=steps(norm=np.ones(20)))}))).replace('\n    ', ' ')
    assert 'error, non_finite, a, 3.weight' in two and all(o in two.splitlines()[-1] for o in ('depth (a)', 'depth (b)'))
    assert str(diagnose(GradRecord())).startswith('nothing was recorded')
    assert str(diagnose(GradRecord(steps=steps(norm=np.ones(20))))).startswith('no findings\nnot checked: ')
    assert str(f).startswith(repr(f[:1])) and not f[:1].ok and not f[f['severity']=='error'].ok and repr(f.copy())==str(f) and type(f[['rule','evidence']]) is pd.DataFrame
    for d in (f[:1], f[['rule','evidence']], f[f['severity']=='error'], f.copy(), f.drop(columns='try'), f.reset_index()): assert len(repr(d)) and 'non_finite' in d.to_string()
    del f['evidence']
    assert 'non_finite' in repr(f)

@pytest.fixture(scope='module')
def stats(): return run(lambda learn: None, GradStatsCallback())

@pytest.mark.parametrize('call,says', [
    (lambda l: diagnose(l, factor='x'), 'factor: a number'), (lambda l: diagnose(l, window=-3), 'window: a whole number'), (lambda l: diagnose(l, dead=5), 'dead: a number from 0 to 1'),
    (lambda l: l.grad_stats.top(3, 'foo'), 'stat: accepted are .*max_abs'), (lambda l: l.grad_stats.suggest_clip('a'), 'q: a number'), (lambda l: l.grad_stats.suggest_clip(), 'GradNormCallback'),
    (lambda l: grad_along_ray(l.model, [1]), 'learn: a Learner'), (lambda l: grad_along_ray(l, 'a'), 'scales: '), (lambda l: per_sample_norms(l.model, 3), 'learn: a Learner'),
    (lambda l: GradRecord.load(5), 'folder: a path'), (lambda l: l.grad_stats.by('module'), 'GradNormCallback'), (lambda l: l.grad_stats.elasticity(), 'GradNormCallback')])
def test_errors(stats, call, says):
    with pytest.raises((TypeError,ValueError), match=says) as e: call(stats)
    assert '\n' not in str(e.value)

def test_select_of_nothing(stats):
    "As in pandas: what is not there is no row, be it that a frozen layer had no gradient."
    assert len(stats.grad_stats.select(name='zzz').df)==0
