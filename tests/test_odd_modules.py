"Odd modules and what they return: training is what it is without us, rows are autograd's or one sentence says why there are none."
import collections,io
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
from fastai_gradstats.capture import OutputHooks,clean_name,grad_modules,grad_params
from helpers.callbacks import TrainOnly
from helpers.models import FunctionNet,ReturnsWrapped
from helpers.oracles import GradSpy,as_float64,check_params,compare_row,output_grads
from helpers.training import both_callbacks,fit,loaders,row_names,rows_of,tanh_mlp,trained_alike,vector_data,vector_learner

# --- modules that take no hook

scripted_models = dict(child=lambda: nn.Sequential(torch.jit.script(nn.Linear(6,8)), nn.Tanh(), nn.Linear(8,3)),
                whole=lambda: torch.jit.script(nn.Sequential(nn.Linear(6,8), nn.Tanh(), nn.Linear(8,3))),
                traced=lambda: torch.jit.trace(nn.Sequential(nn.Linear(6,8), nn.Tanh(), nn.Linear(8,3)), torch.randn(2,6)),
                part_traced=lambda: nn.Sequential(torch.jit.trace(nn.Sequential(nn.Linear(6,8), nn.Tanh()), torch.randn(2,6)), nn.Tanh(), nn.Linear(8,3)))

@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('kind', scripted_models)
def test_torchscript(kind):
    "One sentence names what takes no hook; the parameters are what the optimizer got, other outputs autograd's."
    learn,said = trained_alike(scripted_models[kind], spy := GradSpy())
    check_params(learn.grad_stats.df, spy, learn.grad_norm.norms)
    assert row_names(learn)==(['2'] if kind in ('child','part_traced') else [])
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
    learn,said = trained_alike(make)
    assert row_names(learn)==['2'] and len(said)==1 and "'0'" in said[0] and 'no hooks here' in said[0]
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

# --- what modules return

@dataclass
class HalfSet: h:object; loss:object = field(init=False)
@dataclass(slots=True)
class SlottedData: h:object; rest:object = field(init=False)
@dataclass(eq=False)
class Node: h:object; up:object = None; down:object = None
def in_itself(h): d = dict(h=h); d['me'] = d; return d
def two_nodes(h): n = Node(h); n.down = Node(h*1, up=n); return n
def deep_list(h):
    for _ in range(3000): h = [h]
    return h
def innermost(o):
    while isinstance(o, list): o = o[0]
    return o
Tagged = collections.namedtuple('Pair', 'a h')
class Lazy(dict):
    "Computes when asked"
    def __getitem__(self, k): raise RuntimeError('computed')
    def values(self): raise RuntimeError('computed')
class HasProperties:
    def __init__(self, h): self._h = h
    @property
    def h(self): return self._h
    @property
    def other(self): raise RuntimeError('a property ran')
class SlotsOnly:
    __slots__ = ('h','never')
    def __init__(self, h): self.h = h

containers_looked_into = dict(
    unset=(HalfSet,lambda o: o.h),
    slots=(SlottedData,lambda o: o.h),
    in_itself=(in_itself,lambda o: o['h']),
    tree=(two_nodes,lambda o: o.h),
    deep=(deep_list,innermost),
    deque=(lambda h: collections.deque([h]),lambda o: o[0]),
    set=(lambda h: {h},lambda o: next(iter(o))),
    userdict=(lambda h: collections.UserDict(h=h),lambda o: o['h']),
    proxy=(lambda h: MappingProxyType(dict(h=h)),lambda o: o['h']),
    namespace=(lambda h: SimpleNamespace(h=h),lambda o: o.h),
    namedtuple=(lambda h: Tagged(1,h),lambda o: o.h),
    lazy=(lambda h: Lazy(h=h),lambda o: dict.__getitem__(o, 'h')),
    ordered=(lambda h: OrderedDict(h=h),lambda o: o['h']))
sealed_outputs = dict(
    property=(HasProperties,lambda o: o.h),
    slots_only=(SlotsOnly,lambda o: o.h),
    distribution=(lambda h: torch.distributions.Normal(h, 1.),lambda o: o.mean),
    generator=(lambda h: (t for t in [h]),next),
    set_of_two=(lambda h: {h,h*2},lambda o: sum(o)))

def wrapped_and_unwrapped(wrap, unwrap): return lambda: FunctionNet(lambda s,x: s.b(unwrap(s.a(x))), a=ReturnsWrapped(wrap), b=nn.Linear(8,3))

@pytest.mark.parametrize('kind', containers_looked_into)
def test_containers(kind):
    "The row of the tensor inside is autograd's."
    wrap,unwrap = containers_looked_into[kind]
    learn,said = trained_alike(wrapped_and_unwrapped(wrap, unwrap))
    plain,_ = trained_alike(wrapped_and_unwrapped(noop, noop))
    assert said==[]
    a,b = (rows_of(l).query("name=='a'") for l in (learn,plain))
    if kind=='tree': a = a[a['out']==a['out'].min()]
    for c in ('norm','max_abs','numel'): assert a[c].tolist()==b[c].tolist()

@pytest.mark.parametrize('kind', sealed_outputs)
def test_sealed(kind):
    "What cannot be looked into has no row and one sentence a fit; nothing of it runs."
    learn,said = trained_alike(wrapped_and_unwrapped(*sealed_outputs[kind]), n=2)
    assert row_names(learn)==['b']
    assert len(said)==1 and "'a'" in said[0] and 'cannot be looked into' in said[0]

def test_attrs():
    attr = pytest.importorskip('attr')
    @attr.s
    class Out: h = attr.ib(); n = attr.ib(default=3)
    learn,said = trained_alike(wrapped_and_unwrapped(Out, lambda o: o.h))
    assert said==[] and row_names(learn)==['a','b']

def test_nothing_to_say():
    "Numbers, texts and None beside a tensor need no sentence."
    learn,said = trained_alike(wrapped_and_unwrapped(lambda h: dict(h=h, n=3, s='a', none=None, m=nn.ReLU(), a=np.ones(2)), lambda o: o['h']))
    assert said==[] and row_names(learn)==['a','b']

# --- copies

def copies_of(learn):
    "Ways to copy or save the live model"
    m = learn.model
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    return dict(deepcopy=deepcopy(m), ema=torch.optim.swa_utils.AveragedModel(m).module, saved=torch.load(file, weights_only=False),
                scripted=torch.jit.script(m))

@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('event', ('before_batch','after_pred','after_loss','after_backward','before_step','after_batch'))
def test_copies(event):
    "Made at any event, a copy has no hook and can be scripted; so can the live model. Its calls leave no rows."
    kept = {}
    class Copies(Callback):
        run_valid = False
    def f(self):
        if self.train_iter!=1: return
        kept.update(copies_of(self.learn))
        for n,m in kept.items():
            if n!='scripted': m(torch.ones(2,6)).sum().backward()   # that one shares its parameters with the live model
    setattr(Copies, event, f)
    learn,said = trained_alike(tanh_mlp, Copies())
    plain,_ = trained_alike(tanh_mlp)
    assert said==[] and len(kept)==4
    for m in kept.values(): assert not any(o._forward_hooks for o in m.modules() if not isinstance(o, torch.jit.ScriptModule))
    torch.jit.script(kept['deepcopy'])
    assert rows_of(learn)['norm'].tolist()==rows_of(plain)['norm'].tolist()

def test_other_hooks_may_change_the_output():
    "The row is of what the module returns after a hook that was there before."
    def make():
        m = tanh_mlp()
        m[0].register_forward_hook(lambda m,i,o: o*3)
        return m
    x,y = vector_data()
    learn,_ = trained_alike(make)
    set_seed(0)
    fresh = vector_learner(make).model
    o = fresh[0](x[:8]).detach().requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(fresh[2](o.tanh()), y[:8]), o)
    compare_row(rows_of(learn).iloc[0], as_float64(g))

# --- parametrizations, lazy layers, names

class ScaledWeight(nn.Module):
    "A parametrization with a parameter of its own"
    def __init__(self): super().__init__(); self.s = nn.Parameter(torch.ones(1))
    def forward(self, w): return w*self.s

def with_scaled_weight(m): parametrize.register_parametrization(m, 'weight', ScaledWeight()); return m
class CachedTwice(nn.Module):
    def __init__(self): super().__init__(); self.a,self.h = parametrizations.weight_norm(nn.Linear(6,6)),nn.Linear(6,3)
    def forward(self, x):
        with parametrize.cached(): return self.h(self.a(self.a(x)))

parametrized = dict(weight_norm=lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6,8, bias=False)), nn.Tanh(), nn.Linear(8,3)),
              orthogonal=lambda: nn.Sequential(nn.Linear(6,8), nn.Tanh(), parametrizations.orthogonal(nn.Linear(8,3, bias=False))),
              spectral=lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6,8)), nn.Tanh(), nn.Linear(8,3)),
              own=lambda: nn.Sequential(with_scaled_weight(nn.Linear(6,8, bias=False)), nn.Tanh(), nn.Linear(8,3)),
              old=lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6,8, bias=False)), nn.Tanh(), nn.Linear(8,3)), cached=CachedTwice)

@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('kind', parametrized)
def test_parametrizations(kind):
    "Output rows are the layers', no others; parameters have torch's names."
    names = ['a','h'] if kind=='cached' else ['0','2']
    learn,said = trained_alike(parametrized[kind], spy := GradSpy())
    assert said==[] and row_names(learn)==names
    check_params(learn.grad_stats.df, spy, learn.grad_norm.norms)
    if kind in ('cached','spectral'): return   # a copy of these cannot be made in mid-fit, or draws
    set_seed(0)
    fresh = vector_learner(parametrized[kind]).model
    x,y = vector_data()
    want = output_grads(fresh, lambda m: F.cross_entropy(m(x[:8]), y[:8]), names) if kind!='old' else None
    if want:
        for r in rows_of(learn).query('iteration==0').to_dict('records'): compare_row(r, want[r['name'],0,0])

def test_parameter_lists():
    "A list cannot be called: its parameters are its parent's, whose output has the row."
    class Listed(nn.Module):
        def __init__(self): super().__init__(); self.ws,self.d = nn.ParameterList([torch.ones(6,6)]),nn.ParameterDict(dict(b=torch.zeros(6)))
        def forward(self, x): return x@self.ws[0]+self.d['b']
    learn,said = trained_alike(lambda: nn.Sequential(Listed(), nn.Linear(6,3)))
    assert said==[] and row_names(learn)==['0','1']
    assert row_names(learn, 'param')==['0.ws.0','0.d.b','1.weight','1.bias']

lazy_models = [lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3)),
               lambda: nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(3)),
               lambda: nn.Sequential(nn.Unflatten(1, (1,6)), nn.LazyConv1d(2,3), nn.Flatten(), nn.LazyLinear(3))]

@pytest.mark.parametrize('make', lazy_models)
def test_lazy(make):
    "Hooks are there before the first forward, and stay right when it changes a layer's class."
    m = make()
    names = list(grad_modules(m))
    assert names==[n for n,o in m.named_modules() if 'Lazy' in type(o).__name__] and len(grad_params(m))>=4
    got = {}
    with OutputHooks(grad_modules(m).values(), lambda i,call,out,g: got.update({names[i]:g})) as hooks:
        x,y = vector_data()
        hooks.watch()
        F.cross_entropy(m(x), y).backward()
    want = output_grads(m, lambda m: F.cross_entropy(m(x), y), names)
    assert set(got)==set(names)
    for n in names: np.testing.assert_allclose(as_float64(got[n]), want[n,0,0], rtol=1e-5, atol=1e-9)

def test_averaged_model():
    "A wrapper's component is no part of a name, as with DDP."
    make = lambda: torch.optim.swa_utils.AveragedModel(tanh_mlp())
    learn,said = trained_alike(make)
    assert said==[] and row_names(learn)==['0','2'] and row_names(learn, 'param')==['0.weight','0.bias','2.weight','2.bias']
    assert clean_name(nn.DataParallel(torch.optim.swa_utils.AveragedModel(tanh_mlp())), 'module.module.0.weight')=='0.weight'

# --- layers that are used and not called

uncalled_layers = dict(
    forward=lambda s,x: s.b(s.a.forward(x)),
    linear=lambda s,x: s.b(F.linear(x, s.a.weight, s.a.bias)),
    matmul=lambda s,x: s.b(x@s.a.weight.t()),
    penalty=lambda s,x: s.b(x[:,:1]*s.a.weight.square().sum().expand(1,8)))

@pytest.mark.parametrize('kind', uncalled_layers)
def test_used_without_a_call(kind):
    "One sentence a fit names the layer; its parameters are right."
    make = lambda: FunctionNet(uncalled_layers[kind], a=nn.Linear(6,8), b=nn.Linear(8,3))
    learn,said = trained_alike(make, spy := GradSpy(), n=2)
    assert row_names(learn)==['b'] and len(said)==1 and "'a'" in said[0] and "'b'" not in said[0] and 'never called' in said[0]
    check_params(learn.grad_stats.df, spy)

def tied(s):
    s.d.weight = s.e.weight
    return s
nothing_to_say = dict(
    attention=lambda: FunctionNet(lambda s,x: s.h(s.att(x[:,None],x[:,None],x[:,None])[0][:,0]), att=nn.MultiheadAttention(6,2),
                                  h=nn.Linear(6,3)),
    encoder=lambda: FunctionNet(lambda s,x: s.h(s.t(x[:,None])[:,0]), t=nn.TransformerEncoderLayer(6,2,8, dropout=0.),
                                h=nn.Linear(6,3)),
    tied=lambda: tied(FunctionNet(lambda s,x: s.h(s.d(x)), e=nn.Linear(6,6, bias=False), d=nn.Linear(6,6, bias=False),
                                  h=nn.Linear(6,3))),
    unused=lambda: FunctionNet(lambda s,x: s.h(x), u=nn.Linear(6,6), h=nn.Linear(6,3)),
    sometimes=lambda: FunctionNet(lambda s,x: s.h(s.u(x) if next(s.turn)%2 else x), u=nn.Linear(6,6), h=nn.Linear(6,3),
                                  turn=count()),
    checkpoint=lambda: FunctionNet(lambda s,x: s.h(torch.utils.checkpoint.checkpoint(s.u, x.requires_grad_(), use_reentrant=True)),
                                   u=nn.Linear(6,6), h=nn.Linear(6,3)))

@pytest.mark.parametrize('kind', nothing_to_say)
def test_nothing_to_say_of_calls(kind):
    "Attention's own projections, tied weights, layers that are unused, used now and then, or recomputed in backward."
    assert trained_alike(nothing_to_say[kind])[1]==[]

# --- transforms and traces

class InTransform(nn.Module):
    "Runs one module inside a transform of `torch.func`"
    def __init__(self, how): super().__init__(); self.l,self.head,self.how = nn.Linear(6,6),nn.Linear(6,3),how
    def forward(self, x): return self.head(self.how(self.l, x))

def batched_jacobian(l, x):
    "All rows of the Jacobian in one backward"
    x = x.detach().requires_grad_()
    y = l(x)
    return y+torch.autograd.grad(y, x, torch.eye(6)[:,None].expand(6,*y.shape), is_grads_batched=True, create_graph=True)[0].sum(0)

@pytest.mark.parametrize('how',
                         (batched_jacobian, lambda l,x: torch.func.vmap(l)(x),
                          lambda l,x: torch.func.vmap(torch.func.jacrev(l))(x).sum(1),
                          lambda l,x: l(x)+torch.func.grad(lambda x: l(x).square().sum())(x)),
                         ids=('batched','vmap','jacrev','penalty'))
def test_inside_torch_func(how):
    "Its output is the transform's; parameters, norms and other modules are as ever, and it is said once"
    cbs,spy,x,y = both_callbacks(),GradSpy(),torch.randn(8,6),torch.randint(3, (8,))
    learn = Learner(loaders(x, y, 4), InTransform(how), loss_func=F.cross_entropy, cbs=[*cbs,spy,TrainOnly()])
    with pytest.warns(UserWarning, match="'l' ran inside a transform") as w: fit(learn)
    assert sum('transform' in str(o.message) for o in w)==1
    df = learn.grad_stats.df
    check_params(df, spy, learn.grad_norm.norms)
    out = df[df['kind']=='output']
    assert {'head'}<=set(out['name'])<={'l','head'} and (out['call']==0).all()

def test_traced_in_forward():
    "A trace runs the modules once more, with sizes that are tensors"
    class Traces(nn.Module):
        def __init__(self): super().__init__(); self.l,self.head = nn.Linear(6,6),nn.Linear(6,3)
        def forward(self, x):
            if not torch.jit.is_tracing(): torch.jit.trace(self.l, x, check_trace=False)
            return self.head(self.l(x))
    cbs,spy = both_callbacks(),GradSpy()
    learn = fit(Learner(loaders(torch.randn(8,6), torch.randint(3, (8,)), 4), Traces(), loss_func=F.cross_entropy, cbs=[*cbs,spy,TrainOnly()]))
    df = learn.grad_stats.df
    check_params(df, spy, learn.grad_norm.norms)
    assert df[df['kind']=='output'][['iteration','name','call']].values.tolist()==[[i,n,0] for i in (0,1) for n in ('l','head')]
