"What the callbacks are asked to record: how often, of what, with whose statistics; and what an error of ours, or of such a statistic, costs."
import warnings
import numpy as np,pandas as pd,pytest,torch
from copy import copy
from fastai.basics import *
from fastai.callback.training import GradientAccumulation
from torch import nn
from fastai_gradstats import GradNormCallback,GradStatsCallback
from helpers.callbacks import ByRows,acting_callback,clip_gradients
from helpers.models import FunctionNet
from helpers.oracles import GradSpy,compare_row
from helpers.training import (
    both_callbacks, fit, image_learner, linear_classifier, rows_of, stats_callback, step_learner, tanh_mlp, trained_alike,
    vector_batches, warned)

# --- every, threshold, extra

def test_every():
    all_,some = (fit(image_learner(cbs=[GradStatsCallback(every=e), GradNormCallback(every=e)], n=160)) for e in (1,3))
    for n,at in (('grad_stats','iteration'),('grad_norm','step')):
        d = getattr(all_, n).df
        pd.testing.assert_frame_equal(getattr(some, n).df, d[d[at]%3==0].reset_index(drop=True), rtol=1e-6)

def test_every_with_accumulation():
    "One iteration in n for outputs, one step in n for parameters."
    d = fit(image_learner(linear_classifier, [GradStatsCallback(every=3), GradientAccumulation(32)], n=16*12)).grad_stats.df
    assert d.loc[d['kind']=='output','iteration'].tolist()==[0,3,6,9]
    assert d.loc[d['kind']=='param','step'].unique().tolist()==[0,3]

def test_extra_and_threshold():
    stats,spy = GradStatsCallback(threshold=.01, extra=dict(median=lambda g: g.float().abs().median())),GradSpy()
    learn = fit(image_learner(cbs=[stats, GradNormCallback(), spy], n=16))
    for _,r in learn.grad_stats.select(kind='param').df.iterrows():
        compare_row(r, spy.grads[0][r['name']], .01)
        v = np.sort(np.abs(spy.grads[0][r['name']]).ravel())
        np.testing.assert_allclose(r['median'], v[(len(v)-1)//2], rtol=1e-6)

def abs_in_place(g): return g.abs_().max()
def max_by_numpy(g): return torch.as_tensor(float(np.abs(g.numpy(), out=g.numpy()).max()))
def draws_numbers(g): return g.flatten()[torch.randint(g.numel(), (8,))].abs().max()
def raises_value_error(g): raise ValueError('my own')
def not_a_number(g): return g.abs()

@pytest.mark.parametrize('f', (abs_in_place,max_by_numpy,draws_numbers))
@pytest.mark.parametrize('cls', (GradStatsCallback,ByRows))
def test_extra_changes_nothing(f, cls):
    "In place, through numpy, at random: the same training, and the other columns are the plain run's."
    learn,said = trained_alike(lambda: nn.Sequential(nn.Linear(6,8), nn.Dropout(.5), nn.Linear(8,3)), cls(extra=dict(m=f, after=lambda g: g.sum())))
    plain,_ = trained_alike(lambda: nn.Sequential(nn.Linear(6,8), nn.Dropout(.5), nn.Linear(8,3)), cls())
    a,b = (stats_callback(l).df for l in (learn,plain))
    assert said==[] and a['mean'].tolist()==b['mean'].tolist()
    np.testing.assert_allclose(a['after'], a['mean']*a['numel'], rtol=1e-3, atol=1e-6)
    if f is not draws_numbers: np.testing.assert_allclose(a['m'], a['max_abs'], rtol=1e-6)

@pytest.mark.parametrize('f', (raises_value_error,not_a_number))
def test_extra_that_fails(f):
    "NaN in its column, one sentence, all other numbers as they are."
    learn,said = trained_alike(tanh_mlp, GradStatsCallback(extra=dict(m=f)), n=2)
    assert len(said)==1 and "'m'" in said[0]
    assert learn.grad_stats.df['m'].isna().all() and np.isfinite(learn.grad_stats.df['norm']).all()

# --- arguments that change, and wrong ones

def test_bad_arguments_at_fit():
    with pytest.raises(ValueError, match='include.*matches no name'): fit(image_learner(cbs=GradStatsCallback(include='layer5')))
    with pytest.raises(ValueError, match='not part of the model'): fit(image_learner(cbs=GradStatsCallback(modules=[nn.Linear(1,1)])))
    learn = image_learner(cbs=(c := GradStatsCallback()))
    with pytest.raises(ValueError, match='twice'): fit(learn, cbs=c)

@pytest.mark.parametrize('name,value', (('hist',True), ('threshold',.01), ('extra',{'k':lambda g: g.sum()}), ('keep',2)))
def test_lasting_arguments(name, value):
    "They may change while the record is empty; later they stay, with a word"
    learn = step_learner([GradStatsCallback()])
    setattr(learn.grad_stats, name, value)
    fit(learn)
    want = step_learner([GradStatsCallback(**{name:value})])
    fit(want)
    assert learn.grad_stats.df.equals(want.grad_stats.df)
    setattr(learn.grad_stats, name, GradStatsCallback().__dict__[name])
    with warned() as messages: fit(learn)
    assert len(messages)==1 and f'{name} stays' in messages[0]
    fit(want)
    assert list(learn.grad_stats.df)==list(want.grad_stats.df) and len(learn.grad_stats.df)==len(want.grad_stats.df)

@pytest.mark.parametrize('name,value', (('show',True), ('update_every',1)))
def test_lasting_arguments_of_norms(name, value):
    learn = step_learner([GradNormCallback()], valid=True)
    fit(learn)
    setattr(learn.grad_norm, name, value)
    with warned() as messages: fit(learn)
    assert len(messages)==1 and f'{name} stays' in messages[0] and len(learn.grad_norm.df)==8

@pytest.mark.parametrize('name,value', (('every',2), ('include','0'), ('kind','param')))
def test_arguments_that_may_change(name, value):
    learn = step_learner([GradStatsCallback()])
    fit(learn)
    setattr(learn.grad_stats, name, value)
    fit(learn)
    want = step_learner([GradStatsCallback(**{name:value})])
    fit(want)
    assert len(learn.grad_stats.select(fit=1).df)==len(want.grad_stats.df)
    setattr(learn.grad_stats, name, 0)
    with pytest.raises((ValueError,TypeError), match=f'{name}:'): fit(learn)

def test_update_every_beside_every():
    with pytest.raises(ValueError, match='update_every: .*every=3'): GradNormCallback(every=3, update_every=2)
    learn = step_learner([GradNormCallback(every=2, update_every=4)], dls=vector_batches(8))
    fit(learn)
    assert learn.grad_norm.df['step'].tolist()==[0,2,4,6] and learn.grad_norm.df['update_norm'].notna().tolist()==[True,False]*2

def test_numpy_numbers_and_copies(monkeypatch):
    "numpy's integers are integers; a copy has a record of its own; RANK without processes is a word in the environment"
    cb = GradStatsCallback(every=np.int64(1), keep=np.int32(50), threshold=np.float32(.5))
    monkeypatch.setenv('RANK', '1')
    learn = step_learner()
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
    learn = step_learner([GradStatsCallback(extra=dict(fails=fails)), GradNormCallback()])
    with warned() as messages: fit(learn)
    bare = step_learner()
    fit(bare)
    assert all(torch.equal(a, b) for a,b in zip(learn.model.state_dict().values(), bare.model.state_dict().values()))
    assert any('no such number' in m for m in messages)
    assert learn.grad_norm.df['step'].tolist()==[0,1,2,3] and learn.grad_stats.df['iteration'].nunique()>=3

def test_warnings_that_are_errors(capsys):
    "A sentence of ours ends no training"
    learn = step_learner([*both_callbacks(), acting_callback(clip_gradients)()])
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        fit(learn)
        assert len(learn.grad_norm.df)==4
    assert 'changed the gradients' in capsys.readouterr().err

class TwoOutputs(nn.Module):
    "Two outputs, of which the gradient of the second cannot be read in one iteration"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.rand(6,8))
    def forward(self, x): return x@self.w,(x@self.w).tanh()

@pytest.mark.parametrize('cls', (GradStatsCallback,ByRows))
def test_a_module_is_left_out_whole(cls, monkeypatch):
    "A hook of ours fails for one of two outputs: that module has no row in that iteration, all others are there, and one sentence says it."
    from fastai_gradstats.engine import Engine
    read,n = Engine.put,[0]
    def fails(self, key, g, *scale):
        n[0] += g.shape==(8,8)
        if g.shape==(8,8) and n[0]==4: raise RuntimeError('out of luck')
        return read(self, key, g, *scale)
    monkeypatch.setattr(Engine, 'put', fails)
    make = lambda: FunctionNet(lambda s,x: s.h(sum(s.a(x))), a=TwoOutputs(), h=nn.Linear(8,3))
    learn,said = trained_alike(make, cls())
    d = rows_of(learn)
    assert d.groupby('name', observed=True)['iteration'].apply(list).to_dict()==dict(a=[0,0,2,2], h=[0,1,2])
    assert len(said)==1 and "'a'" in said[0] and 'out of luck' in said[0]

def test_one_module_is_a_list_of_one():
    "Not the modules inside a Sequential; a ModuleList is a list"
    def names_recorded(modules, net):
        x = torch.randn(8,3)
        dl = DataLoader(L(zip(x, x)), bs=4)
        learn = Learner(DataLoaders(dl, dl), net, loss_func=nn.MSELoss(), cbs=[GradStatsCallback(modules=modules)])
        return set(fit(learn).grad_stats.df['name'])
    net = nn.Sequential(nn.Sequential(nn.Linear(3,4), nn.ReLU()), nn.Linear(4,3))
    assert names_recorded(net[0], net)=={'0','0.0.weight','0.0.bias'}
    assert names_recorded(nn.ModuleList(net[0]), net)=={'0.0','0.1','0.0.weight','0.0.bias'}
