"Other routes to the numbers: autograd for outputs, copies of `p.grad` for parameters, numpy in float64 for statistics."
import numpy as np,torch
from fastai.basics import *
from fastai.callback.fp16 import MixedPrecision
from torch import nn

def fit(learn, n=1, **kwargs):
    "`fit` in silence; returns the learner"
    with learn.no_bar(), learn.no_logging(): learn.fit(n, **kwargs)
    return learn

class Spy(Callback):
    "Copies gradients just before the optimizer's step, and asks torch for their total norm"
    order,run_valid = MixedPrecision.order+.4,False
    def __init__(self): self.grads,self.norms = [],[]
    def before_step(self):
        gs = {n:p.grad for n,p in self.model.named_parameters() if p.requires_grad and p.grad is not None}
        self.grads.append({n:np64(g) for n,g in gs.items()})
        self.norms.append(nn.utils.get_total_norm([g.coalesce().values() if g.is_sparse else g for g in gs.values()]).item())

class Seed(Callback):
    "The same dropout in both routes"
    order = -9
    def before_batch(self): torch.manual_seed(7)

def np64(g):
    "A gradient as numpy, in double precision"
    g = g.detach().to_dense() if g.layout!=torch.strided else g.detach()
    return g.cpu().to(torch.complex128 if g.is_complex() else torch.float64).numpy().copy()

def compare(row, g, threshold=1.):
    "A row against float64"
    a,f = np.abs(g),np.isfinite(g)
    want = dict(max_abs=a.max(), mean_abs=a.mean(), norm=np.sqrt((a**2).sum()), std=g.std())
    if f.all():
        for c,v in want.items(): np.testing.assert_allclose(row[c], np.float32(v), rtol=1e-5, atol=1e-45, err_msg=f"{row['name']} {c}")
        np.testing.assert_allclose(row['mean'], g.real.mean(), atol=1e-6*a.mean()+1e-45, err_msg=f"{row['name']} mean")
    else: assert not np.isfinite(row['max_abs']) and not np.isfinite(row['norm'])
    assert [row[c] for c in ('numel','zeros','nonfinite','above')]==[g.size, (g==0).sum(), (~f).sum(), (a>threshold).sum()], row['name']

def _map(f, o):
    "A module's output with `f` applied to its tensors, in flattened order; other leaves count too"
    if isinstance(o, dict): return type(o)(**{k:_map(f, v) for k,v in o.items()}) if type(o) is not dict else {k:_map(f, v) for k,v in o.items()}
    if hasattr(o, '_fields'): return type(o)(*(_map(f, v) for v in o))
    if isinstance(o, (tuple,list)): return type(o)(_map(f, v) for v in o)
    return f(o)

def output_grads(model, loss, names):
    "{(name, out, call): gradient} by `torch.autograd.grad`: each output of the modules `names` is kept and a clone handed on, so that nothing in place touches it"
    kept,calls,hooks = {},Counter(),[]
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
    for n in names: hooks.append(mods['' if n=='(model)' else n].register_forward_hook(hook(n)))
    gs = torch.autograd.grad(loss(model), list(kept.values()), allow_unused=True)
    for h in hooks: h.remove()
    return {k:np64(g) for k,g in zip(kept, gs) if g is not None}
