"Other routes to the numbers: autograd for outputs, copies of `p.grad` for parameters, numpy in float64 for statistics."
import dataclasses
import numpy as np,torch
from copy import copy,deepcopy
from fastai.basics import *
from fastai.callback.fp16 import MixedPrecision
from torch import nn
from fastai_gradstats import GradNormCallback,GradStatsCallback
from helpers.callbacks import Seed,TrainOnly,total_norm
from helpers.training import fit,loaders

def as_float64(g):
    "A gradient as numpy, in double precision"
    g = g.detach().to_dense() if g.layout!=torch.strided else g.detach()
    return g.cpu().to(torch.complex128 if g.is_complex() else torch.float64).resolve_neg().numpy().copy()

# --- statistics of one gradient

def compare_row(row, g, threshold=1.):
    "A row against float64; where something is not finite, what IEEE gives"
    a,f,name = np.abs(g),np.isfinite(g),row['name']
    assert [row[c] for c in ('numel','zeros','nonfinite','above')]==[g.size, (g==0).sum(), (~f).sum(), (a>threshold).sum()], name
    if not g.size:
        assert row['max_abs']==row['norm']==0, name
        return
    with np.errstate(all='ignore'):
        want = dict(max_abs=a.max(), mean_abs=a.mean(), norm=np.sqrt((a**2).sum()), std=g.std())
        mean = g.mean().real
        for c,v in want.items():
            atol = 1e-45+1e-7*a.mean() if c=='std' else 1e-45
            np.testing.assert_allclose(row[c], np.float32(v), rtol=1e-5, atol=atol, err_msg=f'{name} {c}')
    np.testing.assert_allclose(row['mean'], np.float32(mean), rtol=0, atol=1e-6*a.mean()+1e-45 if f.all() else 0, err_msg=f'{name} mean')

def octaves_by_numpy(g):
    "Elements per octave, by numpy in double precision: `frexp` gives 2**(e-1) <= |x| < 2**e; what float32 cannot hold is left out"
    x = np.abs(g.double().numpy().ravel())
    octave = np.frexp(x)[1]-1
    o,c = np.unique(octave[np.isfinite(x) & (x>0) & (octave>=-149) & (octave<=127)], return_counts=True)
    return dict(zip(o.tolist(), c.tolist()))

# --- gradients of parameters: copied right before the step

class GradSpy(Callback):
    "Copies gradients just before the optimizer's step, in double precision, and asks torch for their total norm"
    order,run_valid = MixedPrecision.order+.4,False
    def __init__(self): self.grads,self.norms = [],[]
    def before_step(self):
        self.grads.append({n:as_float64(p.grad) for n,p in self.model.named_parameters() if p.requires_grad and p.grad is not None})
        self.norms.append(nn.utils.get_total_norm([torch.from_numpy(np.atleast_1d(g)) for g in self.grads[-1].values()]).item())

def check_params(df, spy, norms=None, threshold=1.):
    "Parameter rows and norms are what `spy` copied at each step"
    df = df[df['kind']=='param']
    assert df['step'].drop_duplicates().tolist()==[i for i,gs in enumerate(spy.grads) if gs]
    for s,gs in enumerate(spy.grads):
        rows = df[df['step']==s]
        assert list(rows['name'])==list(gs)
        for r in rows.to_dict('records'): compare_row(r, gs[r['name']], threshold)
    if norms is not None: np.testing.assert_allclose(norms, [n if gs else np.nan for n,gs in zip(spy.norms, spy.grads)], rtol=1e-5)

def check_against_spy(learn, spy, steps=None):
    "Every parameter row and norm equals what `spy` copied; `steps` says which of the callback's steps those were"
    df = learn.grad_stats.select(kind='param').df
    steps = range(len(spy.grads)) if steps is None else steps
    for s,gs in zip(steps, spy.grads):
        rows = df[df['step']==s]
        assert list(rows['name'])==list(gs)
        for _,r in rows.iterrows(): compare_row(r, gs[r['name']])
    assert df['step'].nunique()==len(spy.grads)
    norms = learn.grad_norm.df.set_index('step')['norm']
    np.testing.assert_allclose(norms[list(steps)], spy.norms, rtol=1e-5)

class OptimizerTruth:
    "Wraps what every loop must call, as the first to do so: copies of gradients and weights right where the optimizer steps"
    def __init__(self, learn):
        self.model,self.got,self.moved = learn.model,[],[]
        if learn.opt is None: learn.create_opt()
        step = learn.opt.step
        def f(*args, **kwargs):
            took_part = [(n,p) for n,p in self.model.named_parameters() if p.grad is not None and p.requires_grad]
            self.got.append({n:p.grad.detach().double().clone() for n,p in took_part})
            old = [p.detach().clone() for p in self.model.parameters()]
            res = step(*args, **kwargs)
            self.moved.append(total_norm(p.detach()-o for p,o in zip(self.model.parameters(), old)))
            return res
        learn.opt.step = f
    @property
    def norms(self): return [total_norm(gs.values()) for gs in self.got]

def check_against_optimizer(learn, truth):
    "Parameter rows of the steps that were taken are the optimizer's gradients"
    d = learn.grad_stats.select(kind='param').df
    taken = learn.grad_norm.df.query('~skipped')['step'].tolist()
    assert len(taken)==len(truth.got)
    for step,gs in zip(taken, truth.got):
        rows = d[d['step']==step]
        assert rows['name'].tolist()==list(gs)
        np.testing.assert_allclose(rows['norm'], [total_norm([g]) for g in gs.values()], rtol=1e-5)

# --- gradients of outputs: by autograd, on a copy

def owner_names(model):
    "Names of the modules that own a parameter, in network order"
    return [n or '(model)' for n,m in model.named_modules() if any(p is not None for p in m._parameters.values())]

def map_leaves(f, o):
    "A module's output with `f` applied to its leaves, in order: containers of every kind are copied"
    if isinstance(o, dict):
        res = copy(o)
        for k,v in o.items(): res[k] = map_leaves(f, v)
        return res
    if dataclasses.is_dataclass(o):
        res = copy(o)
        for d in dataclasses.fields(o): setattr(res, d.name, map_leaves(f, getattr(o, d.name)))
        return res
    if hasattr(o, '_fields'): return type(o)(*(map_leaves(f, v) for v in o))
    if isinstance(o, (tuple,list)): return type(o)(map_leaves(f, v) for v in o)
    return f(o)

copy_tensor = Tensor.__deepcopy__
def twin_of(model):
    "A copy of the model, with what it kept of the last forward (fastai's hooks, AWD_LSTM's dropped weights) cut off from its graph"
    Tensor.__deepcopy__ = lambda t, memo: copy_tensor(t if t.is_leaf else t.detach(), memo)
    try: return deepcopy(model)
    finally: Tensor.__deepcopy__ = copy_tensor

def output_grads(model, loss, names):
    """{(name, out, call): gradient} by `torch.autograd.grad` on a copy: each output of the modules `names` is kept and a clone
    handed on, so that nothing in place touches it"""
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
            o = map_leaves(keep, o)
            calls[name] += seen
            return o
        return f
    mods = dict(model.named_modules())
    for n in names: mods['' if n=='(model)' else n].register_forward_hook(hook(n))
    gs = torch.autograd.grad(loss(model), list(kept.values()), allow_unused=True)
    return {k:as_float64(g) for k,g in zip(kept, gs) if g is not None}

class Twin(Callback):
    "Before each training batch, what its output gradients are going to be, from a copy of the model in the same random state"
    order,run_valid = GradSpy.order,False
    def __init__(self,
                 names=None, # of modules; None: those that own a parameter
                 loss=None, # function of learner and model; None: the learner's loss
                 its=None # the iterations to look at; None: all
                ):
        self.names,self.its = names,its
        self.loss = loss or (lambda l,m: l.loss_func(m(*l.xb), *l.yb))
        self.grads,self.n = {},0
    def before_batch(self):
        if self.its is None or self.n in self.its:
            names = self.names or owner_names(self.model)
            with torch.random.fork_rng(): self.grads[self.n] = output_grads(self.model, partial(self.loss, self.learn), names)
        self.n += 1

def check_rows(df, want, names, threshold=1., factor=1.):
    "The output rows of one iteration are those of `want` ({(name, out, call): gradient}), all of them, in network order"
    rank = {n:i for i,n in enumerate(names)}
    keys = sorted(want, key=lambda k: (rank[k[0]],k[2],k[1]))
    assert list(zip(df['name'], df['out'], df['call']))==keys
    for k,r in zip(keys, df.to_dict('records')): compare_row(r, want[k]*factor, threshold)

def check_outputs(df, twin, names, factor=1.):
    "Every iteration that `twin` looked at"
    df = df[df['kind']=='output']
    for i,want in twin.grads.items(): check_rows(df[df['iteration']==i], want, names, factor=factor)

# --- both, of one batch

def check_batch(model, x, y, loss=F.cross_entropy, listed=None, opt_func=SGD, n_rows=None, stats=GradStatsCallback):
    "One training batch; `listed` names modules to record instead of those that own a parameter. Returns the frame"
    mods = {n or '(model)':m for n,m in model.named_modules()}
    names = [n for n in mods if n in listed] if listed else owner_names(model)
    model.train()
    torch.manual_seed(7)
    want = output_grads(model, lambda m: loss(m(x), y), names)
    cb,norm,spy = stats(modules=[mods[n] for n in names] if listed else None),GradNormCallback(),GradSpy()
    fit(Learner(loaders(x, y), model, loss_func=loss, opt_func=opt_func, lr=1e-3, cbs=[cb,norm,spy,Seed(),TrainOnly()]))
    df = cb.df
    assert want and (n_rows is None or len(want)==n_rows)
    check_rows(df[df['kind']=='output'], want, names)
    if not listed: check_params(df, spy, norm.norms)
    return df

def names_of_kind(df, kind): return set(df.loc[df['kind']==kind,'name'])
