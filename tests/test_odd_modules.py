"Odd modules, outputs and tensors: training is what it is without us, rows are autograd's or one sentence says why there are none."
import collections,io,warnings
from copy import deepcopy
from dataclasses import dataclass,field
from itertools import count
from types import MappingProxyType

import numpy as np,pytest,torch
import torch._dynamo
import torch.nn.functional as F
from fastai.basics import *
from torch import nn
from torch.nn.utils import parametrizations,parametrize

from fastai_gradstats import GradNormCallback,GradStatsCallback
from fastai_gradstats.capture import OutputHooks,clean_name,grad_modules,grad_params
from oracles import ByRows,Spy,TrainOnly,Twin,by,check_outputs,check_params,compare,fit,loaders,np64,output_grads,owners

del test,test_close,test_eq,test_eq_type,test_fail,test_fig_exists,test_is,test_ne,test_set,test_shuffled,test_sig,test_stdout,test_warns   # fastcore's, which fastai exports and pytest would collect

def data(n=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n,6, generator=g),torch.randint(3, (n,), generator=g)

def learner(make, cbs=(), loss=F.cross_entropy, cls=Learner, opt_func=SGD, bs=8):
    dls = loaders(*data(), bs=bs)
    set_seed(0)
    return cls(dls, make(), loss_func=loss, opt_func=opt_func, lr=.05, cbs=[*cbs, TrainOnly()])

class Losses(Callback):
    order = 2000
    def before_fit(self): self.losses = []
    def after_loss(self):
        if self.training: self.losses.append(self.learn.loss.detach().clone())

def trained(make, *cbs, n=1, **kw):
    "Losses, weights and random state after a fit"
    learn = fit(learner(make, [*cbs, (seen := Losses())], **kw), n)
    weights = [p.detach().clone() for p in learn.model.parameters()]
    return learn,[*seen.losses, *weights, torch.get_rng_state()]

def same(a, b):
    def dense(t): return t.to_dense() if t.layout is not torch.strided else t
    return len(a)==len(b) and all(torch.equal(dense(x), dense(y)) for x,y in zip(a, b))

def both(make, *cbs, n=1, **kw):
    "Trained with both callbacks, the same bits as without; returns the learner and what was said"
    _,bare = trained(make, *(deepcopy(c) for c in cbs if not isinstance(c, (GradStatsCallback,GradNormCallback))), n=n, **kw)
    ours = [] if any(isinstance(c, GradStatsCallback) for c in cbs) else [GradStatsCallback()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        learn,with_us = trained(make, *ours, GradNormCallback(), *cbs, n=n, **kw)
    assert same(bare, with_us)
    return learn,[str(w.message) for w in caught if 'fastai_gradstats' in w.filename]

def stats(learn): return next(c for c in learn.cbs if isinstance(c, GradStatsCallback))
def rows(learn, kind='output'): return stats(learn).select(kind=kind).df
def named(learn, kind='output'): return list(rows(learn, kind)['name'].unique())

class Net(nn.Module):
    "A model from a function of itself and its input"
    def __init__(self, f, **kw):
        super().__init__()
        self.f = f
        for k,v in kw.items(): setattr(self, k, v)
    def forward(self, x): return self.f(self, x)

class Returns(nn.Module):
    "A layer whose output is wrapped by a function"
    def __init__(self, wrap): super().__init__(); self.wrap,self.w = wrap,nn.Parameter(torch.linspace(-1, 1, 48).view(6,8))
    def forward(self, x): return self.wrap((x@self.w).tanh())

# --- modules that take no hook

scripted = dict(child=lambda: nn.Sequential(torch.jit.script(nn.Linear(6,8)), nn.Tanh(), nn.Linear(8,3)),
                whole=lambda: torch.jit.script(nn.Sequential(nn.Linear(6,8), nn.Tanh(), nn.Linear(8,3))),
                traced=lambda: torch.jit.trace(nn.Sequential(nn.Linear(6,8), nn.Tanh(), nn.Linear(8,3)), torch.randn(2,6)),
                part_traced=lambda: nn.Sequential(torch.jit.trace(nn.Sequential(nn.Linear(6,8), nn.Tanh()), torch.randn(2,6)), nn.Tanh(), nn.Linear(8,3)))

@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('kind', scripted)
def test_torchscript(kind):
    "One sentence names what takes no hook; the parameters are what the optimizer got, other outputs autograd's."
    learn,said = both(scripted[kind], spy := Spy())
    check_params(learn.grad_stats.df, spy, learn.grad_norm.norms)
    assert named(learn)==(['2'] if kind in ('child','part_traced') else [])
    assert len(said)==1 and 'take no hook' in said[0] and "'0" in said[0]

class Refuses(nn.Linear):
    "Its author wants no hooks"
    def register_forward_hook(self, *args, **kwargs): raise NotImplementedError('no hooks here')

def test_refused_registration():
    "A module that has a hook already and refuses ours: the others are recorded, and no hook of ours stays."
    def make():
        m = nn.Sequential(Refuses(6,8), nn.Tanh(), nn.Linear(8,3))
        nn.Module.register_forward_hook(m[0], lambda m,i,o: None)
        return m
    learn,said = both(make)
    assert named(learn)==['2'] and len(said)==1 and "'0'" in said[0] and 'no hooks here' in said[0]
    assert [len(m._forward_hooks) for m in learn.model]==[1,0,0]

def test_registration_that_is_interrupted():
    "Ctrl-C while hooks are put on: none stays."
    class Stops(nn.Linear):
        def register_forward_hook(self, *args, **kwargs): raise KeyboardInterrupt
    m = nn.Sequential(nn.Linear(6,6), Stops(6,6))
    for o in m: nn.Module.register_forward_hook(o, lambda m,i,o: None)
    with pytest.raises(KeyboardInterrupt): OutputHooks(list(m), print)
    assert [len(o._forward_hooks) for o in m]==[1,1]
    m[0](torch.ones(1,6)).sum().backward()

# --- layouts

def csr(w): return w.to_sparse_csr()
class Adjacency(nn.Module):
    "A sparse output"
    def __init__(self, layout): super().__init__(); self.layout,self.w = layout,nn.Parameter(torch.rand(8,8))
    def forward(self): return self.w.to_sparse() if self.layout is torch.sparse_coo else self.w.to_sparse_csr()

def graph(layout): return lambda: Net(lambda s,x: s.h(torch.sparse.mm(s.e(), s.a(x))), a=nn.Linear(6,8), e=Adjacency(layout), h=nn.Linear(8,3))
def pruned():
    w = torch.linspace(-1, 1, 48).view(8,6)
    return Net(lambda s,x: s.h(torch.sparse.mm(s.w, x.t()).t()), w=nn.Parameter((w*(w.abs()>.5)).to_sparse_csr()), h=nn.Linear(8,3))
def packed(layout):
    def f(s, x):
        parts = torch.nested.nested_tensor([x[:3],x[3:]], layout=torch.strided) if layout is torch.strided else torch.nested.as_nested_tensor([x[:3],x[3:]], layout=layout)
        return torch.cat(list(s.h(s.a(parts).relu()).unbind()))
    return lambda: Net(f, a=nn.Linear(6,8), h=nn.Linear(8,3))

sgd = partial(OptimWrapper, opt=torch.optim.SGD)
layouts = dict(coo=graph(torch.sparse_coo), csr=graph(torch.sparse_csr), csr_weight=pruned, nested=packed(torch.strided), jagged=packed(torch.jagged))

@pytest.mark.filterwarnings('ignore:Sparse', 'ignore:The PyTorch API of nested')
@pytest.mark.parametrize('cls', (GradStatsCallback,ByRows))
@pytest.mark.parametrize('path', ('kernel','blocks'))
@pytest.mark.parametrize('layout', layouts)
def test_layouts(layout, path, cls):
    "Trains the same; each parameter row is what the optimizer got, each output row the dense gradient of the same elements."
    with by(path): learn,said = both(layouts[layout], cls(), (spy := Spy()), opt_func=sgd)
    assert said==[]
    check_params(rows(learn, 'param'), spy)
    n = rows(learn).query('iteration==0').set_index('name')['numel'].to_dict()
    assert n==dict(coo=dict(a=64, e=64, h=24), csr=dict(a=64, e=64, h=24), csr_weight={'(model)':24,'h':24}, nested=dict(a=64, h=24), jagged=dict(a=64, h=24))[layout]

@pytest.mark.filterwarnings('ignore:Sparse', 'ignore:The PyTorch API of nested')
def test_nested_values():
    "Rows of a nested run are those of the same samples in one tensor."
    a,_ = both(packed(torch.strided))
    b,_ = both(packed(torch.jagged))
    c,_ = both(lambda: Net(lambda s,x: s.h(s.a(x).relu()), a=nn.Linear(6,8), h=nn.Linear(8,3)))
    for learn in (a,b):
        for col in ('norm','max_abs','mean','std'): np.testing.assert_allclose(rows(learn)[col], rows(c)[col], rtol=1e-4, atol=1e-9)

@pytest.mark.filterwarnings('ignore:Sparse')
def test_sparse_weight_values():
    "A CSR weight's gradient, its norm, and g·w, against the same weight dense."
    learn,_ = both(pruned, opt_func=sgd)
    x,y = data()
    model = pruned()
    set_seed(0)
    d = learn.grad_stats.select(kind='param', name='w').df.iloc[0]
    fresh = learner(pruned, opt_func=sgd).model
    w = fresh.w.detach().to_dense().requires_grad_()
    F.cross_entropy(fresh.h((w@x[:8].t()).t()), y[:8]).backward()
    kept = fresh.w.detach().to_dense()!=0
    g = w.grad*kept
    np.testing.assert_allclose(d['norm'], g.norm(), rtol=1e-5)
    assert d['numel']==48 and d['zeros']==int((~kept).sum())
    p = learn.grad_norm.by('param').query("name=='w'").iloc[0]
    np.testing.assert_allclose([p['weight_norm'],p['dot']], [(w*kept).norm().item(), (g*w).sum().item()], rtol=1e-5)

class Wrapper(Tensor):
    "A subclass that wraps a tensor and can copy it, nothing else"
    @staticmethod
    def __new__(cls, inner): return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
    def __init__(self, inner): self.inner = inner
    def __tensor_flatten__(self): return ['inner'],None
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): raise NotImplementedError(f'no {func}')
    def __repr__(self): return 'Wrapper'

class Foreign(Callback):
    "Gives a parameter a gradient that only its own optimizer could read"
    order = Spy.order+.05   # right before ours
    def before_step(self):
        self.kept = self.learn.model[0].weight.grad
        self.learn.model[0].weight.grad = None
        self.learn.model[0].weight.grad = Wrapper(self.kept)
class Home(Callback):
    order = 900
    def before_step(self): self.learn.model[0].weight.grad = None; self.learn.model[0].weight.grad = self.learn.foreign.kept

def mlp(): return nn.Sequential(nn.Linear(6,8), nn.Tanh(), nn.Linear(8,3))

def test_wrapper_subclass():
    "A gradient that cannot be read has no row, one sentence names it, the others are there; so for norms alone."
    learn,said = both(mlp, Foreign(), Home())
    assert '0.weight' not in named(learn, 'param') and len(named(learn, 'param'))==3
    unread = [s for s in said if 'could not be read' in s]
    assert len(unread)==1 and "'0.weight'" in unread[0]   # the other sentence: `Foreign` acts before the reading
    with pytest.warns(UserWarning, match="'0.weight' could not be read") as w: trained(mlp, norm := GradNormCallback(), Foreign(), Home(), spy := Spy())
    others = [np.sqrt(sum((g**2).sum() for n,g in gs.items() if n!='0.weight')) for gs in spy.grads]
    np.testing.assert_allclose(norm.norms, others, rtol=1e-5)

# --- what modules return

@dataclass
class HalfSet: h:object; loss:object = field(init=False)
@dataclass(slots=True)
class Slots: h:object; rest:object = field(init=False)
@dataclass(eq=False)
class Node: h:object; up:object = None; down:object = None
def in_itself(h): d = dict(h=h); d['me'] = d; return d
def tree(h): n = Node(h); n.down = Node(h*1, up=n); return n
def deep(h):
    for _ in range(3000): h = [h]
    return h
def first(o):
    while isinstance(o, list): o = o[0]
    return o
Pair = collections.namedtuple('Pair', 'a h')
class Lazy(dict):
    "Computes when asked"
    def __getitem__(self, k): raise RuntimeError('computed')
    def values(self): raise RuntimeError('computed')
class Property:
    def __init__(self, h): self._h = h
    @property
    def h(self): return self._h
    @property
    def other(self): raise RuntimeError('a property ran')
class SlotsOnly:
    __slots__ = ('h','never')
    def __init__(self, h): self.h = h

looked_into = dict(unset=(HalfSet,lambda o: o.h), slots=(Slots,lambda o: o.h), in_itself=(in_itself,lambda o: o['h']), tree=(tree,lambda o: o.h), deep=(deep,first), deque=(lambda h: collections.deque([h]),lambda o: o[0]),
    set=(lambda h: {h},lambda o: next(iter(o))), userdict=(lambda h: collections.UserDict(h=h),lambda o: o['h']), proxy=(lambda h: MappingProxyType(dict(h=h)),lambda o: o['h']), namespace=(lambda h: SimpleNamespace(h=h),lambda o: o.h),
    namedtuple=(lambda h: Pair(1,h),lambda o: o.h), lazy=(lambda h: Lazy(h=h),lambda o: dict.__getitem__(o, 'h')), ordered=(lambda h: OrderedDict(h=h),lambda o: o['h']))
sealed = dict(property=(Property,lambda o: o.h), slots_only=(SlotsOnly,lambda o: o.h), distribution=(lambda h: torch.distributions.Normal(h, 1.),lambda o: o.mean), generator=(lambda h: (t for t in [h]),next),
    set_of_two=(lambda h: {h,h*2},lambda o: sum(o)))

def wrapped(wrap, unwrap): return lambda: Net(lambda s,x: s.b(unwrap(s.a(x))), a=Returns(wrap), b=nn.Linear(8,3))

@pytest.mark.parametrize('kind', looked_into)
def test_containers(kind):
    "The row of the tensor inside is autograd's."
    wrap,unwrap = looked_into[kind]
    learn,said = both(wrapped(wrap, unwrap))
    plain,_ = both(wrapped(noop, noop))
    assert said==[]
    a,b = (rows(l).query("name=='a'") for l in (learn,plain))
    if kind=='tree': a = a[a['out']==a['out'].min()]
    for c in ('norm','max_abs','numel'): assert a[c].tolist()==b[c].tolist()

@pytest.mark.parametrize('kind', sealed)
def test_sealed(kind):
    "What cannot be looked into has no row and one sentence a fit; nothing of it runs."
    learn,said = both(wrapped(*sealed[kind]), n=2)
    assert named(learn)==['b']
    assert len(said)==1 and "'a'" in said[0] and 'cannot be looked into' in said[0]

def test_attrs():
    attr = pytest.importorskip('attr')
    @attr.s
    class Out: h = attr.ib(); n = attr.ib(default=3)
    learn,said = both(wrapped(Out, lambda o: o.h))
    assert said==[] and named(learn)==['a','b']

def test_nothing_to_say():
    "Numbers, texts and None beside a tensor need no sentence."
    learn,said = both(wrapped(lambda h: dict(h=h, n=3, s='a', none=None, m=nn.ReLU(), a=np.ones(2)), lambda o: o['h']))
    assert said==[] and named(learn)==['a','b']

# --- copies

def copies(learn):
    "Ways to copy or save the live model"
    m = learn.model
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    return dict(deepcopy=deepcopy(m), ema=torch.optim.swa_utils.AveragedModel(m).module, saved=torch.load(file, weights_only=False), scripted=torch.jit.script(m))

@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('event', ('before_batch','after_pred','after_loss','after_backward','before_step','after_batch'))
def test_copies(event):
    "Made at any event, a copy has no hook and can be scripted; so can the live model. Its calls leave no rows."
    kept = {}
    class Copies(Callback):
        run_valid = False
    def f(self):
        if self.train_iter!=1: return
        kept.update(copies(self.learn))
        for n,m in kept.items():
            if n!='scripted': m(torch.ones(2,6)).sum().backward()   # that one shares its parameters with the live model
    setattr(Copies, event, f)
    learn,said = both(mlp, Copies())
    plain,_ = both(mlp)
    assert said==[] and len(kept)==4
    for m in kept.values(): assert not any(o._forward_hooks for o in m.modules() if not isinstance(o, torch.jit.ScriptModule))
    torch.jit.script(kept['deepcopy'])
    assert rows(learn)['norm'].tolist()==rows(plain)['norm'].tolist()

def test_other_hooks_may_change_the_output():
    "The row is of what the module returns after a hook that was there before."
    def make():
        m = mlp()
        m[0].register_forward_hook(lambda m,i,o: o*3)
        return m
    x,y = data()
    learn,_ = both(make)
    set_seed(0)
    fresh = learner(make).model
    o = fresh[0](x[:8]).detach().requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(fresh[2](o.tanh()), y[:8]), o)
    compare(rows(learn).iloc[0], np64(g))

# --- parametrizations, lazy layers, names

class Scale(nn.Module):
    "A parametrization with a parameter of its own"
    def __init__(self): super().__init__(); self.s = nn.Parameter(torch.ones(1))
    def forward(self, w): return w*self.s

def of_scale(m): parametrize.register_parametrization(m, 'weight', Scale()); return m
class Twice(nn.Module):
    def __init__(self): super().__init__(); self.a,self.h = parametrizations.weight_norm(nn.Linear(6,6)),nn.Linear(6,3)
    def forward(self, x):
        with parametrize.cached(): return self.h(self.a(self.a(x)))

normed = dict(weight_norm=lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6,8, bias=False)), nn.Tanh(), nn.Linear(8,3)),
              orthogonal=lambda: nn.Sequential(nn.Linear(6,8), nn.Tanh(), parametrizations.orthogonal(nn.Linear(8,3, bias=False))),
              spectral=lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6,8)), nn.Tanh(), nn.Linear(8,3)),
              own=lambda: nn.Sequential(of_scale(nn.Linear(6,8, bias=False)), nn.Tanh(), nn.Linear(8,3)),
              old=lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6,8, bias=False)), nn.Tanh(), nn.Linear(8,3)), cached=Twice)

@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('kind', normed)
def test_parametrizations(kind):
    "Output rows are the layers', no others; parameters have torch's names."
    names = ['a','h'] if kind=='cached' else ['0','2']
    learn,said = both(normed[kind], spy := Spy())
    assert said==[] and named(learn)==names
    check_params(learn.grad_stats.df, spy, learn.grad_norm.norms)
    if kind in ('cached','spectral'): return   # a copy of these cannot be made in mid-fit, or draws
    set_seed(0)
    fresh = learner(normed[kind]).model
    x,y = data()
    want = output_grads(fresh, lambda m: F.cross_entropy(m(x[:8]), y[:8]), names) if kind!='old' else None
    if want:
        for r in rows(learn).query('iteration==0').to_dict('records'): compare(r, want[r['name'],0,0])

def test_parameter_lists():
    "A list cannot be called: its parameters are its parent's, whose output has the row."
    class Listed(nn.Module):
        def __init__(self): super().__init__(); self.ws,self.d = nn.ParameterList([torch.ones(6,6)]),nn.ParameterDict(dict(b=torch.zeros(6)))
        def forward(self, x): return x@self.ws[0]+self.d['b']
    learn,said = both(lambda: nn.Sequential(Listed(), nn.Linear(6,3)))
    assert said==[] and named(learn)==['0','1']
    assert named(learn, 'param')==['0.ws.0','0.d.b','1.weight','1.bias']

lazies = [lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3)), lambda: nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(3)),
          lambda: nn.Sequential(nn.Unflatten(1, (1,6)), nn.LazyConv1d(2,3), nn.Flatten(), nn.LazyLinear(3))]

@pytest.mark.parametrize('make', lazies)
def test_lazy(make):
    "Hooks are there before the first forward, and stay right when it changes a layer's class."
    m = make()
    names = list(grad_modules(m))
    assert names==[n for n,o in m.named_modules() if 'Lazy' in type(o).__name__] and len(grad_params(m))>=4
    got = {}
    with OutputHooks(grad_modules(m).values(), lambda i,call,out,g: got.update({names[i]:g})) as hooks:
        x,y = data()
        hooks.watch()
        F.cross_entropy(m(x), y).backward()
    want = output_grads(m, lambda m: F.cross_entropy(m(x), y), names)
    assert set(got)==set(names)
    for n in names: np.testing.assert_allclose(np64(got[n]), want[n,0,0], rtol=1e-5, atol=1e-9)

def test_averaged_model():
    "A wrapper's component is no part of a name, as with DDP."
    make = lambda: torch.optim.swa_utils.AveragedModel(mlp())
    learn,said = both(make)
    assert said==[] and named(learn)==['0','2'] and named(learn, 'param')==['0.weight','0.bias','2.weight','2.bias']
    assert clean_name(nn.DataParallel(torch.optim.swa_utils.AveragedModel(mlp())), 'module.module.0.weight')=='0.weight'

# --- layers that are used and not called

uncalled = dict(forward=lambda s,x: s.b(s.a.forward(x)), linear=lambda s,x: s.b(F.linear(x, s.a.weight, s.a.bias)), matmul=lambda s,x: s.b(x@s.a.weight.t()), penalty=lambda s,x: s.b(x[:,:1]*s.a.weight.square().sum().expand(1,8)))

@pytest.mark.parametrize('kind', uncalled)
def test_used_without_a_call(kind):
    "One sentence a fit names the layer; its parameters are right."
    make = lambda: Net(uncalled[kind], a=nn.Linear(6,8), b=nn.Linear(8,3))
    learn,said = both(make, spy := Spy(), n=2)
    assert named(learn)==['b'] and len(said)==1 and "'a'" in said[0] and "'b'" not in said[0] and 'never called' in said[0]
    check_params(learn.grad_stats.df, spy)

def tie(s):
    s.d.weight = s.e.weight
    return s
quiet = dict(attention=lambda: Net(lambda s,x: s.h(s.att(x[:,None],x[:,None],x[:,None])[0][:,0]), att=nn.MultiheadAttention(6,2), h=nn.Linear(6,3)),
             encoder=lambda: Net(lambda s,x: s.h(s.t(x[:,None])[:,0]), t=nn.TransformerEncoderLayer(6,2,8, dropout=0.), h=nn.Linear(6,3)),
             tied=lambda: tie(Net(lambda s,x: s.h(s.d(x)), e=nn.Linear(6,6, bias=False), d=nn.Linear(6,6, bias=False), h=nn.Linear(6,3))),
             unused=lambda: Net(lambda s,x: s.h(x), u=nn.Linear(6,6), h=nn.Linear(6,3)),
             sometimes=lambda: Net(lambda s,x: s.h(s.u(x) if next(s.turn)%2 else x), u=nn.Linear(6,6), h=nn.Linear(6,3), turn=count()),
             checkpoint=lambda: Net(lambda s,x: s.h(torch.utils.checkpoint.checkpoint(s.u, x.requires_grad_(), use_reentrant=True)), u=nn.Linear(6,6), h=nn.Linear(6,3)))

@pytest.mark.parametrize('kind', quiet)
def test_nothing_to_say_of_calls(kind):
    "Attention's own projections, tied weights, layers that are unused, used now and then, or recomputed in backward."
    assert both(quiet[kind])[1]==[]

# --- torch.compile

class Decorated(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(6,8),nn.Linear(8,3)
    @torch.compile(backend='eager')
    def forward(self, x): return self.b(self.a(x).tanh())
class Method(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(6,8),nn.Linear(8,3); self.f = torch.compile(self._f, backend='eager')
    def _f(self, x): return self.b(self.a(x).tanh())
    def forward(self, x): return self.f(x)
class Part(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(6,8),nn.Linear(8,3)
    @torch.compile(backend='eager')
    def part(self, x): return self.a(x)
    def forward(self, x): return self.b(self.part(x).tanh())
@torch.compile(backend='eager')
def outside(m, x): return m.b(m.a(x).tanh())
class Function(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(6,8),nn.Linear(8,3)
    def forward(self, x): return outside(self, x)

@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()

@pytest.mark.parametrize('cls', (Decorated,Method,Part,Function))
def test_compiled_code(cls, fresh):
    "Compiled before the callback came: the promised warning once a fit, and its remedy works."
    learn = fit(learner(cls))
    def said():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            fit(learn, 2, cbs=(gcb := GradStatsCallback()))
        texts = [str(w.message) for w in caught if 'fastai_gradstats' in w.filename]
        return gcb,texts
    gcb,texts = said()
    assert len(texts)==1 and 'torch._dynamo.reset' in texts[0] and "'a'" in texts[0]
    assert set(gcb.select(kind='output').df['name'])<=({'b'} if cls is Part else set())

# --- which backward is the loss's

class Retain(Learner):
    def _backward(self): self.loss_grad.backward(retain_graph=True)

class Aside(Callback):
    "Asks for another gradient at an event"
    def __init__(self, event, how, order=0):
        self.how,self.order = how,order
        setattr(self, event, self.f)
    def f(self):
        if self.training: self.how(self.learn)

def hessian(learn):
    g, = torch.autograd.grad(learn.pred.square().sum()*1e3, learn.model[0].weight, create_graph=True)
    torch.autograd.grad(g.square().sum(), learn.model[2].weight, retain_graph=True)
def per_task(learn):
    for i in range(3): torch.autograd.grad(learn.pred[:,i].sum()*1e3, list(learn.model.parameters()), retain_graph=True)
def of_input(learn):
    learn.pred.sum().backward(inputs=[learn.xb[0].requires_grad_()], retain_graph=True) if learn.xb[0].requires_grad else None

@pytest.mark.parametrize('how', (hessian,per_task))
@pytest.mark.parametrize('event,order', (('after_loss',0), ('before_backward',-20), ('before_backward',20), ('after_backward',-20), ('after_backward',20), ('before_step',0), ('before_step',20), ('after_step',0)))
def test_gradients_beside_the_backward(event, order, how):
    "They leave no row: the record is that of the run without them."
    if event=='after_step' and how is hessian: how = lambda l: torch.autograd.grad(l.pred.sum()*1e3, l.pred, retain_graph=True)
    if event=='after_step' and how is per_task: return   # weights have moved: torch itself raises
    learn,said = both(mlp, Aside(event, how, order), cls=Retain)
    plain,_ = both(mlp)
    a,b = rows(learn),rows(plain)
    assert said==[] and a['norm'].tolist()==b['norm'].tolist() and a['call'].tolist()==b['call'].tolist()

class Penalty(Learner):
    "WGAN-GP: a gradient's gradient is part of the loss"
    def _backward(self):
        x = self.xb[0].detach().requires_grad_()
        g, = torch.autograd.grad(self.model(x).sum(), x, create_graph=True)
        (self.loss_grad+g.square().mean()).backward()

def test_gradient_penalty():
    "Rows of the second forward are the derivative of loss and penalty with respect to that output."
    learn,said = both(mlp, cls=Penalty)
    set_seed(0)
    m,(x,y) = learner(mlp).model,data()
    x,y = x[:8].clone(),y[:8]
    first = m[0](x)
    loss = F.cross_entropy(m[2](first.tanh()), y)
    z = x.clone().requires_grad_()
    second = m[0](z)
    g, = torch.autograd.grad(m[2](second.tanh()).sum(), z, create_graph=True)
    want = torch.autograd.grad(loss+g.square().mean(), [first,second])
    d = rows(learn).query("iteration==0 and name=='0'").to_dict('records')
    assert said==[] and len(d)==2
    for r,g in zip(d, want): compare(r, np64(g))

class Inputs(Learner):
    def _backward(self): self.loss_grad.backward(inputs=list(self.model.parameters()))
class InputsOfHead(Learner):
    def _backward(self): self.loss_grad.backward(inputs=[self.model[2].weight])
class ByHand(Learner):
    "Per-task gradients that somebody combines"
    def _backward(self):
        ps = list(self.model.parameters())
        for p,g in zip(ps, torch.autograd.grad(self.loss_grad, ps)): p.grad = g.clone()

def test_backward_of_some_parameters():
    "`backward(inputs=...)` trains those parameters, and its rows are the plain run's."
    plain,_ = both(mlp)
    assert rows(both(mlp, cls=Inputs)[0])['norm'].tolist()==rows(plain)['norm'].tolist()
    learn,_ = both(mlp, cls=InputsOfHead, opt_func=sgd)
    a,b = (rows(l).query("iteration==0 and name=='2'")['norm'].tolist() for l in (learn,plain))
    assert a==b

def test_gradients_set_by_hand():
    "No backward at all: no output rows, one sentence, parameters right."
    learn,said = both(mlp, (spy := Spy()), cls=ByHand, n=2)
    assert named(learn)==[] and len(said)==1 and 'autograd.grad' in said[0]
    check_params(learn.grad_stats.df, spy, learn.grad_norm.norms)

# --- -inf by design

class Scores(nn.Module):
    "Masks one class"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.linspace(-.5, .5, 24).view(8,3)); self.register_buffer('off', torch.tensor([False,False,True]))
    def forward(self, x): return (x@self.w).masked_fill(self.off, -torch.inf)
class Bad(nn.Module):
    "Passes on; forward or backward turns bad when told to"
    now = None
    def forward(self, x):
        x = x*1.
        if self.now=='backward' and x.requires_grad: x.register_hook(lambda g: g*torch.nan)
        return x*torch.nan if self.now=='forward' else x*torch.inf if self.now=='inf' else x
class At(Callback):
    order = 20
    def __init__(self, at, what): self.at,self.what = at,what
    def before_batch(self): self.learn.model[1].now = self.what if self.train_iter==self.at else None

def masked(): return nn.Sequential(nn.Linear(6,8), Bad(), nn.Linear(8,8), nn.Tanh(), Scores())
def masked_first(): return nn.Sequential(Net(lambda s,x: s.s(x@s.w).softmax(1), s=Scores(), w=nn.Parameter(torch.eye(6)[:,:6]@torch.ones(6,8)/6)), Bad(), nn.Linear(3,3))
def of_two(o, y): return F.cross_entropy(o, y%2)

@pytest.mark.parametrize('cls', (GradStatsCallback,ByRows))
@pytest.mark.parametrize('what', (None,'forward','backward','inf'))
@pytest.mark.parametrize('make', (masked,masked_first))
def test_masks(make, what, cls):
    "A mask is no break, before or after the module that breaks."
    learn = fit(learner(make, [gcb := cls(), At(2, what)], loss=of_two if make is masked else F.cross_entropy))
    f = gcb.first_nonfinite()
    assert len(gcb.record.breaks)==int(what in ('forward','inf'))
    if what is None: return   # rows of a mask's own gradient are finite
    near,far = ('2','0') if make is masked else ('2','0')
    if what=='backward': assert f.where=='backward'
    else: assert f.where=='forward' and f[2]==near

# --- statistics of the user's

def in_place(g): return g.abs_().max()
def by_numpy(g): return torch.as_tensor(float(np.abs(g.numpy(), out=g.numpy()).max()))
def drawing(g): return g.flatten()[torch.randint(g.numel(), (8,))].abs().max()
def failing(g): raise ValueError('my own')
def not_a_number(g): return g.abs()

@pytest.mark.parametrize('f', (in_place,by_numpy,drawing))
@pytest.mark.parametrize('cls', (GradStatsCallback,ByRows))
def test_extra_changes_nothing(f, cls):
    "In place, through numpy, at random: the same training, and the other columns are the plain run's."
    learn,said = both(lambda: nn.Sequential(nn.Linear(6,8), nn.Dropout(.5), nn.Linear(8,3)), cls(extra=dict(m=f, after=lambda g: g.sum())))
    plain,_ = both(lambda: nn.Sequential(nn.Linear(6,8), nn.Dropout(.5), nn.Linear(8,3)), cls())
    a,b = (stats(l).df for l in (learn,plain))
    assert said==[] and a['mean'].tolist()==b['mean'].tolist()
    np.testing.assert_allclose(a['after'], a['mean']*a['numel'], rtol=1e-3, atol=1e-6)
    if f is not drawing: np.testing.assert_allclose(a['m'], a['max_abs'], rtol=1e-6)

@pytest.mark.parametrize('f', (failing,not_a_number))
def test_extra_that_fails(f):
    "NaN in its column, one sentence, all other numbers as they are."
    learn,said = both(mlp, GradStatsCallback(extra=dict(m=f)), n=2)
    assert len(said)==1 and "'m'" in said[0]
    assert learn.grad_stats.df['m'].isna().all() and np.isfinite(learn.grad_stats.df['norm']).all()

# --- nothing of ours gets out of a hook

class Part8(nn.Module):
    "Two outputs, of which the gradient of the second cannot be read in one iteration"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.rand(6,8))
    def forward(self, x): return x@self.w,(x@self.w).tanh()

@pytest.mark.parametrize('cls', (GradStatsCallback,ByRows))
def test_a_module_is_left_out_whole(cls, monkeypatch):
    "A hook of ours fails for one of two outputs: that module has no row in that iteration, all others are there, and one sentence says it."
    from fastai_gradstats.engine import Engine
    read,n = Engine.put,[0]
    def fails(self, key, g):
        n[0] += g.shape==(8,8)
        if g.shape==(8,8) and n[0]==4: raise RuntimeError('out of luck')
        return read(self, key, g)
    monkeypatch.setattr(Engine, 'put', fails)
    make = lambda: Net(lambda s,x: s.h(sum(s.a(x))), a=Part8(), h=nn.Linear(8,3))
    learn,said = both(make, cls())
    d = rows(learn)
    assert d.groupby('name', observed=True)['iteration'].apply(list).to_dict()==dict(a=[0,0,2,2], h=[0,1,2])
    assert len(said)==1 and "'a'" in said[0] and 'out of luck' in said[0]
