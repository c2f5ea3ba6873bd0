"Other routes to the numbers: autograd for outputs, copies of `p.grad` for parameters, numpy in float64 for statistics."
import dataclasses
import numpy as np,pytest,torch
from contextlib import contextmanager
from copy import copy,deepcopy
from fastai.basics import *
from fastai.callback.fp16 import MixedPrecision
from torch import nn
from unittest.mock import patch as mock
from fastai_gradstats import GradStatsCallback,by_kernel
from fastai_gradstats.engine import Engine

def fit(learn, n=1, **kwargs):
    "`fit` in silence; returns the learner"
    with learn.no_bar(), learn.no_logging(): learn.fit(n, **kwargs)
    return learn

def loaders(x, y, bs=None, valid=2):
    "All of `x` and `y` as training batches of `bs` (None: one batch), in order; some of it again to validate"
    ds = L(zip(x, y))
    return DataLoaders(DataLoader(ds, bs=bs or len(ds)), DataLoader(ds[:valid], bs=valid))

def np64(g):
    "A gradient as numpy, in double precision"
    g = g.detach().to_dense() if g.layout!=torch.strided else g.detach()
    return g.cpu().to(torch.complex128 if g.is_complex() else torch.float64).resolve_neg().numpy().copy()

class Spy(Callback):
    "Copies gradients just before the optimizer's step, in double precision, and asks torch for their total norm"
    order,run_valid = MixedPrecision.order+.4,False
    def __init__(self): self.grads,self.norms = [],[]
    def before_step(self):
        self.grads.append({n:np64(p.grad) for n,p in self.model.named_parameters() if p.requires_grad and p.grad is not None})
        self.norms.append(nn.utils.get_total_norm([torch.from_numpy(np.atleast_1d(g)) for g in self.grads[-1].values()]).item())

class ByRows(GradStatsCallback):
    "With the engine that a GPU would use"
    def _engine(self): return Engine(self.threshold, self.extra, by_rows=True)

@contextmanager
def by(path):
    "One of the engine's three ways to read: 'kernel', 'blocks' (without numba) or 'rows' (as on a GPU); gives `Engine`'s argument"
    with mock.object(by_kernel, 'find_kernel', (lambda: None) if path=='blocks' else by_kernel.find_kernel): yield True if path=='rows' else None

paths = pytest.mark.parametrize('by_rows', ('kernel', 'blocks', 'rows'), indirect=True)   # the fixture is in conftest.py

class Seed(Callback):
    "The same dropout in both routes"
    order,run_valid = -9,False
    def before_batch(self): torch.manual_seed(7)

class TrainOnly(Callback):
    "No validation"
    def before_validate(self): raise CancelValidException('not needed')

def compare(row, g, threshold=1.):
    "A row against float64; where something is not finite, what IEEE gives"
    a,f,name = np.abs(g),np.isfinite(g),row['name']
    assert [row[c] for c in ('numel','zeros','nonfinite','above')]==[g.size, (g==0).sum(), (~f).sum(), (a>threshold).sum()], name
    if not g.size:
        assert row['max_abs']==row['norm']==0, name
        return
    with np.errstate(all='ignore'):
        want,mean = dict(max_abs=a.max(), mean_abs=a.mean(), norm=np.sqrt((a**2).sum()), std=g.std()),g.mean().real
        for c,v in want.items(): np.testing.assert_allclose(row[c], np.float32(v), rtol=1e-5, atol=1e-45 if c!='std' else 1e-45+1e-7*a.mean(), err_msg=f'{name} {c}')
    np.testing.assert_allclose(row['mean'], np.float32(mean), rtol=0, atol=1e-6*a.mean()+1e-45 if f.all() else 0, err_msg=f'{name} mean')

def owners(model):
    "Names of the modules that own a parameter, in network order"
    return [n or '(model)' for n,m in model.named_modules() if any(p is not None for p in m._parameters.values())]

def _map(f, o):
    "A module's output with `f` applied to its leaves, in order: containers of every kind are copied"
    if isinstance(o, dict):
        res = copy(o)
        for k,v in o.items(): res[k] = _map(f, v)
        return res
    if dataclasses.is_dataclass(o):
        res = copy(o)
        for d in dataclasses.fields(o): setattr(res, d.name, _map(f, getattr(o, d.name)))
        return res
    if hasattr(o, '_fields'): return type(o)(*(_map(f, v) for v in o))
    if isinstance(o, (tuple,list)): return type(o)(_map(f, v) for v in o)
    return f(o)

_deepcopy = Tensor.__deepcopy__
def twin_of(model):
    "A copy of the model, with what it kept of the last forward (fastai's hooks, AWD_LSTM's dropped weights) cut off from its graph"
    Tensor.__deepcopy__ = lambda t, memo: _deepcopy(t if t.is_leaf else t.detach(), memo)
    try: return deepcopy(model)
    finally: Tensor.__deepcopy__ = _deepcopy

def output_grads(model, loss, names):
    "{(name, out, call): gradient} by `torch.autograd.grad` on a copy: each output of the modules `names` is kept and a clone handed on, so that nothing in place touches it"
    model,kept,calls = twin_of(model),{},Counter()
    def hook(name):
        def f(m, inp, o):
            leaf,seen = -1,False
            def keep(t):
                nonlocal leaf,seen
                leaf += 1
                if not isinstance(t, Tensor) or not t.requires_grad: return t
                kept[name,leaf,calls[name]],seen = t,True
                return t.clone()
            o = _map(keep, o)
            calls[name] += seen
            return o
        return f
    mods = dict(model.named_modules())
    for n in names: mods['' if n=='(model)' else n].register_forward_hook(hook(n))
    gs = torch.autograd.grad(loss(model), list(kept.values()), allow_unused=True)
    return {k:np64(g) for k,g in zip(kept, gs) if g is not None}

class Twin(Callback):
    "Before each training batch, what its output gradients are going to be, from a copy of the model in the same random state"
    order,run_valid = Spy.order,False
    def __init__(self,
                 names=None, # of modules; None: those that own a parameter
                 loss=None, # function of learner and model; None: the learner's loss
                 its=None # the iterations to look at; None: all
                ): self.names,self.loss,self.its,self.grads,self.n = names,loss or (lambda l,m: l.loss_func(m(*l.xb), *l.yb)),its,{},0
    def before_batch(self):
        if self.its is None or self.n in self.its:
            with torch.random.fork_rng(): self.grads[self.n] = output_grads(self.model, partial(self.loss, self.learn), self.names or owners(self.model))
        self.n += 1

def check_rows(df, want, names, threshold=1., factor=1.):
    "The output rows of one iteration are those of `want` ({(name, out, call): gradient}), no more and no fewer, in network order, with their values"
    rank = {n:i for i,n in enumerate(names)}
    keys = sorted(want, key=lambda k: (rank[k[0]],k[2],k[1]))
    assert list(zip(df['name'], df['out'], df['call']))==keys
    for k,r in zip(keys, df.to_dict('records')): compare(r, want[k]*factor, threshold)

def check_outputs(df, twin, names, factor=1.):
    "Every iteration that `twin` looked at"
    df = df[df['kind']=='output']
    for i,want in twin.grads.items(): check_rows(df[df['iteration']==i], want, names, factor=factor)

def check_params(df, spy, norms=None, threshold=1.):
    "Parameter rows and norms are what `spy` copied at each step"
    df = df[df['kind']=='param']
    assert df['step'].drop_duplicates().tolist()==[i for i,gs in enumerate(spy.grads) if gs]
    for s,gs in enumerate(spy.grads):
        rows = df[df['step']==s]
        assert list(rows['name'])==list(gs)
        for r in rows.to_dict('records'): compare(r, gs[r['name']], threshold)
    if norms is not None: np.testing.assert_allclose(norms, [n if gs else np.nan for n,gs in zip(spy.norms, spy.grads)], rtol=1e-5)
