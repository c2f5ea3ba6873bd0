"Probes leave the Learner as it was: the next `fit` is the one without a probe, bit for bit; their numbers against autograd; devices without float64."
import collections,functools,io,itertools,random,types,warnings
import numpy as np,pytest,torch
import torch.nn.functional as F
from fastai.basics import *
from fastai.callback.hook import ActivationStats
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader as TorchLoader, TensorDataset, WeightedRandomSampler
from fastai_gradstats import GradNormCallback,GradStatsCallback,grad_along_ray,measure,per_sample_norms
from fastai_gradstats import stats
from fastai_gradstats.stats import statistics
from helpers.callbacks import TrainOnly
from helpers.oracles import GradSpy,check_params
from helpers.training import fit,loaders,same_values,tanh_mlp

def probe_data(n=32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n,6, generator=g),torch.randint(3, (n,), generator=g)
def probe_learner(model=None, loss=F.cross_entropy, dls=None, cbs=(), opt=SGD):
    torch.manual_seed(0)
    model = model() if model else tanh_mlp()
    return Learner(dls or loaders(*probe_data(), 8), model, loss_func=loss, opt_func=opt, lr=.05, cbs=[*cbs,TrainOnly()])
def both_loaders(dl): return DataLoaders(dl, dl)

# --- Learners whose state lies in odd places

class Module(nn.Module):
    "A module with `keep` as attributes and `f(self, x)` in front of an MLP"
    def __init__(self, f, **keep):
        super().__init__()
        self.f,self.net = f,tanh_mlp()
        for k,v in keep.items(): setattr(self, k, v)
    def forward(self, x): return self.net(self.f(self, x))

def scale_by(o): return 1+.01*o
def counts_calls(s, x):
    s.n += 1
    return x*scale_by(s.n)
def counts_in_place(s, x):
    s.k.add_(1.)
    return x*scale_by(s.k)
def behind(s, x):
    s.k.data.add_(1.)
    return x*scale_by(s.k)
def swapped(s, x):
    s.k.data = s.k.data+1
    return x*scale_by(s.k)
def attached(s, x):
    s.k.mul_(.9).add_(s.net[0].weight.mean())   # part of the graph from here on
    s.k.detach_()
    return x*scale_by(s.k)
def listed(s, x):
    s.seen.append(len(s.seen))
    return x*scale_by(len(s.seen))
def sets(s, x):
    s.seen.add(len(s.seen))
    return x*scale_by(len(s.seen))
def counts_in_a_box(s, x):
    s.box['a'][0].n += 1
    return x*scale_by(s.box['a'][0].n)
def array_in_place(s, x):
    s.a += 1
    return x*scale_by(float(s.a[0]))
def torch_noise(s, x): return x+torch.randn(x.shape, generator=s.g)
def numpy_noise(s, x): return x+float(s.g.normal())
def python_noise(s, x): return x+s.g.random()
def legacy_noise(s, x): return x+float(s.g.randn())
def next_of(s, x): return x*scale_by(next(s.it))
def reads(s, x): return x*scale_by(s.file.read(1)[0])
def freezes(s, x):
    s.net[0].weight.requires_grad_(s.n<4)
    return counts_calls(s, x)
def new_attribute(s, x):
    s.late = getattr(s, 'late', 0)+1
    return x*scale_by(s.late)
def switches(s, x):
    torch.backends.cudnn.benchmark = True
    s.eval()
    return x
def globals_too(s, x):
    global calls
    calls += 1
    return x*scale_by(calls)
calls = 0
class OnClass(Module):
    n = 0
    def __init__(self): super().__init__(OnClass.count)
    def count(self, x):
        type(self).n += 1
        return x*scale_by(type(self).n)
class SlotCounter:
    __slots__ = ('n',)
    def __init__(self): self.n = 0

stateful_models = dict(
    counter=lambda: Module(counts_calls, n=0),
    tensor=lambda: Module(counts_in_place, k=torch.zeros(())),
    data=lambda: Module(behind, k=torch.zeros(())),
    swapped_data=lambda: Module(swapped, k=torch.zeros(())),
    attached=lambda: Module(attached, k=torch.zeros(())),
    list=lambda: Module(listed, seen=[]),
    deque=lambda: Module(listed, seen=collections.deque()),
    set=lambda: Module(sets, seen=set()),
    bytearray=lambda: Module(listed, seen=bytearray()),
    nested=lambda: Module(counts_in_a_box, box={'a':(types.SimpleNamespace(n=0),)}),
    slots=lambda: Module(counts_in_a_box, box=collections.OrderedDict(a=[SlotCounter()])),
    array=lambda: Module(array_in_place, a=np.zeros(3)),
    torch_generator=lambda: Module(torch_noise, g=torch.Generator().manual_seed(1)),
    numpy_generator=lambda: Module(numpy_noise, g=np.random.default_rng(1)),
    python_generator=lambda: Module(python_noise, g=random.Random(1)),
    legacy_generator=lambda: Module(legacy_noise, g=np.random.RandomState(1)),
    count=lambda: Module(next_of, it=itertools.count()),
    cycle=lambda: Module(next_of, it=itertools.cycle([1,2,3,4,5])),
    zipped=lambda: Module(next_of, it=map(abs, iter(range(100)))),
    file=lambda: Module(reads, file=io.BytesIO(bytes(range(100)))),
    freezes=lambda: Module(freezes, n=0),
    new_attribute=lambda: Module(new_attribute),
    switches=lambda: Module(switches),
    global_variable=lambda: Module(globals_too),
    on_class=OnClass,
    lstm=lambda: nn.Sequential(nn.Unflatten(1, (2,3)), nn.LSTM(3,4, batch_first=True), Last(), nn.Dropout(.2), nn.Linear(4,3)),
    batchnorm=lambda: nn.Sequential(nn.Linear(6,8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8,3)))
class Last(nn.Module):
    def forward(self, o): return o[0][:,-1]

class Centre(nn.Module):
    "A loss with a running centre"
    def __init__(self): super().__init__(); self.register_buffer('c', torch.zeros(3))
    def forward(self, o, y):
        loss = F.cross_entropy(o-self.c, y)
        with torch.no_grad(): self.c.mul_(.9).add_(o.mean(0), alpha=.1)
        return loss
class MeanOfLosses:
    "A loss that is no module, with a mean of its values"
    def __init__(self): self.mean,self.n = None,0
    def __call__(self, o, y):
        loss = F.cross_entropy(o, y)
        self.n += 1
        self.mean = loss.detach() if self.mean is None else .9*self.mean+.1*loss.detach()
        return loss/self.mean
    def method(self, o, y): return self(o, y)
def warm_up():
    "A loss that counts in its closure"
    n = 0
    def loss(o, y):
        nonlocal n
        n += 1
        return F.cross_entropy(o, y)*min(1, n/40)
    return loss
def remembers(o, y, seen=[]):
    "A loss that keeps something in its default argument"
    seen.append(1)
    return F.cross_entropy(o, y)*(1+.01*len(seen))
def two_losses(o, y, first): return first(o, y)
stateful_losses = dict(
    module=Centre,
    object=MeanOfLosses,
    method=lambda: MeanOfLosses().method,
    closure=warm_up,
    default=lambda: remembers,
    partial=lambda: functools.partial(two_losses, first=MeanOfLosses()),
    lambda_=lambda: (lambda c: lambda o,y: c(o, y))(Centre()))

class MovingData:
    "A data set with something of its own that moves"
    def __init__(self, move, **keep): (self.x,self.y),self.move = probe_data(),move; self.__dict__.update(keep)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.move(self, self.x[i]),self.y[i]
def jitter(s, x): return x+torch.from_numpy(s.rng.normal(size=6)).float()
def brighter(s, x):
    s.n += 1
    return x*scale_by(s.n)
def cached(s, x):
    s.x[0] += .01   # the data itself
    return x
class Jitter(Transform):
    def __init__(self): self.rng = random.Random(3)
    def encodes(self, o:Tensor): return o+self.rng.random() if o.is_floating_point() else o
class Stateful(torch.utils.data.Sampler):
    "Goes on where it was"
    def __init__(self, n): self.n,self.epoch = n,0
    def __len__(self): return self.n
    def __iter__(self):
        self.epoch += 1
        return iter(np.random.default_rng(self.epoch).permutation(self.n).tolist())
def seeded_generator(): return torch.Generator().manual_seed(5)
stateful_loaders = dict(
    numpy_rng=lambda: both_loaders(DataLoader(MovingData(jitter, rng=np.random.default_rng(0)), bs=8)),
    counter=lambda: both_loaders(DataLoader(MovingData(brighter, n=0), bs=8)),
    data=lambda: both_loaders(DataLoader(MovingData(cached), bs=8)),
    transform=lambda: both_loaders(TfmdDL(L(zip(*probe_data())), bs=8, after_item=[Jitter()])),
    shuffled=lambda: both_loaders(DataLoader(L(zip(*probe_data())), bs=8, shuffle=True)),
    torch_loader=lambda: both_loaders(TorchLoader(TensorDataset(*probe_data()), 8, shuffle=True, generator=seeded_generator())),
    torch_global=lambda: both_loaders(TorchLoader(TensorDataset(*probe_data()), 8, shuffle=True)),
    weighted=lambda: both_loaders(TorchLoader(TensorDataset(*probe_data()), 8,
                                              sampler=WeightedRandomSampler(
                                                  torch.rand(32, generator=seeded_generator()), 32, generator=seeded_generator()))),
    sampler=lambda: both_loaders(TorchLoader(TensorDataset(*probe_data()), 8, sampler=Stateful(32))))

makers = {
    **{f'model_{k}':functools.partial(lambda f: probe_learner(model=f), f) for k,f in stateful_models.items()},
    **{f'loss_{k}':functools.partial(lambda f: probe_learner(loss=f()), f) for k,f in stateful_losses.items()},
    **{f'data_{k}':functools.partial(lambda f: probe_learner(dls=f()), f) for k,f in stateful_loaders.items()},
    'adam':lambda: probe_learner(opt=Adam),
    'hooked':lambda: probe_learner(cbs=[ActivationStats(every=1)])}

def random_ray(learn): return grad_along_ray(learn, [.5,1.,2.], direction='random')
def sample_norms(learn): return per_sample_norms(learn, 5)

def left_by_fit(learn):
    "All that a fit leaves"
    return [p.detach().clone() for p in learn.model.state_dict().values()],[p.grad if p.grad is None else p.grad.clone() for p in learn.model.parameters()], \
        [p.requires_grad for p in learn.model.parameters()],[m.training for m in learn.model.modules()],torch.tensor([float(o[0]) for o in learn.recorder.values]), \
        torch.get_rng_state(),torch.from_numpy(np.random.get_state()[1].astype(np.int64)),random.getstate(),torch.backends.cudnn.benchmark

def after_probe(make, probe):
    "What is there after a fit, a probe and another fit; and whether the probe itself left anything"
    global calls
    calls = OnClass.n = 0
    remembers.__defaults__[0].clear()
    torch.backends.cudnn.benchmark = False
    set_seed(0)
    learn = fit(make())
    before = left_by_fit(learn)
    if probe: probe(learn)
    assert same_values(before, left_by_fit(learn))
    fit(learn)
    return left_by_fit(learn)

# `.data=` inside `torch.func` ends the process, with torch alone
def probe_case(name, probe): return pytest.param(name, probe, marks=pytest.mark.slow) if name=='data_transform' else (name,probe)

@pytest.mark.parametrize('name,probe', [probe_case(n, p) for n in makers for p in (random_ray,sample_norms) if (n,p)!=('model_swapped_data',sample_norms)])
def test_next_fit(name, probe):
    "A fit, a probe and a fit are two fits, bit for bit"
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*neither copied.*')
        assert same_values(after_probe(makers[name], None), after_probe(makers[name], probe))

@pytest.mark.parametrize('name', ['model_torch_generator','model_count','model_list','loss_object','data_numpy_rng','data_torch_loader'])
def test_two_probes(name):
    "A probe finds what the one before it found: the same numbers"
    set_seed(0)
    learn = fit(makers[name]())
    assert random_ray(learn).equals(random_ray(learn)) and sample_norms(learn).equals(sample_norms(learn))

def test_scales_start_alike():
    "Each scale is looked at from the same state: the order of the scales does not matter"
    learn = probe_learner(model=stateful_models['counter'], loss=MeanOfLosses())
    a,b = grad_along_ray(learn, [1,2,3]),grad_along_ray(learn, [3,2,1])
    assert a['norm'].tolist()==b['norm'].tolist()[::-1] and a['loss'].tolist()==b['loss'].tolist()[::-1]

class RaisesWhenArmed(MeanOfLosses):
    "Raises, once armed, after it has counted"
    stop = None
    def __call__(self, o, y):
        loss = super().__call__(o, y)
        if self.stop: raise self.stop('now')
        return loss

@pytest.mark.parametrize('stop', [ZeroDivisionError,KeyboardInterrupt])
@pytest.mark.parametrize('probe', [random_ray,sample_norms])
def test_stopped(stop, probe):
    "A probe that is broken off leaves nothing either"
    def go(stopped):
        set_seed(0)
        learn = fit(probe_learner(model=stateful_models['lstm'], loss=RaisesWhenArmed(), dls=stateful_loaders['numpy_rng']()))
        before = left_by_fit(learn)
        if stopped:
            learn.loss_func.stop = stop
            with pytest.raises(stop): probe(learn)
            learn.loss_func.stop = None
        assert same_values(before, left_by_fit(learn))
        return left_by_fit(fit(learn))
    assert same_values(go(False), go(True))

def test_identity():
    "The same objects: gradients, lists, tensors and hooks are those that were there"
    learn = fit(probe_learner(model=lambda: Module(listed, seen=[], k=torch.zeros(2))))
    model = learn.model
    handle = model.net[0].register_forward_hook(lambda m,i,o: None)
    held = [model.seen, model.k, *[p.grad for p in model.parameters()], *model.net[0]._forward_hooks.values(), learn.loss_func, learn.dls.train, learn.opt]
    n = len(model.seen)
    random_ray(learn); sample_norms(learn)
    now = [model.seen, model.k, *[p.grad for p in model.parameters()], *model.net[0]._forward_hooks.values(), learn.loss_func, learn.dls.train, learn.opt]
    assert all(a is b for a,b in zip(held, now)) and len(held)==len(now) and len(model.seen)==n
    handle.remove()

def test_batch_given():
    "The user's batch is not changed by a model that works on its input in place, and each scale gets it as it was"
    learn = probe_learner(model=lambda: Module(lambda s,x: x.mul_(2)))
    x,y = probe_data(8)
    ws = [p.detach()*2 for p in learn.model.parameters()]
    df = grad_along_ray(learn, [1,2], batch=(x,y))
    per_sample_norms(learn, 3, batch=(x,y))
    assert torch.equal(x, probe_data(8)[0])
    want = F.cross_entropy(torch.func.functional_call(learn.model, dict(zip(dict(learn.model.named_parameters()), ws)), (x.clone(),)), y).item()
    assert df['loss'].iloc[1]==pytest.approx(want, rel=1e-6)

def running():
    while True: yield 1

def test_generator_function():
    "What cannot be put back is named, once"
    learn = probe_learner(model=lambda: Module(next_of, it=running()))
    for f in (random_ray, sample_norms):
        with pytest.warns(UserWarning, match='generator in Module: can be neither copied') as w: f(learn)
        assert len([o for o in w if 'neither' in str(o.message)])==1

class MidFit(Callback):
    "A probe after the second batch"
    order,run_valid = 50,False
    def after_batch(self):
        if self.iter==1: random_ray(self.learn); sample_norms(self.learn)

def test_mid_fit():
    "A probe between two batches: the same weights, and our callbacks record training only"
    def go(cbs):
        set_seed(0)
        learn = fit(probe_learner(loss=MeanOfLosses(), dls=stateful_loaders['counter'](), cbs=[GradStatsCallback(), GradNormCallback(), GradSpy(), *cbs]))
        return learn,left_by_fit(learn)
    (a,want),(b,got) = go([]),go([MidFit()])
    assert same_values(want, got)
    assert a.grad_stats.df.equals(b.grad_stats.df) and len(b.grad_stats.df)
    check_params(b.grad_stats.df, b.grad_spy, b.grad_norm.norms)

# --- numbers

def single_norms(learn, b, params):
    "Norms of the gradients of single samples, by autograd"
    res = []
    for i in range(len(b[0])):
        loss = learn.loss_func(learn.model(b[0][i:i+1]), b[1][i:i+1]).mean()
        gs = torch.autograd.grad(loss, params, allow_unused=True)
        res.append(sum(g.abs().double().square().sum().item() for g in gs if g is not None)**.5)
    return res

class SharedWeight(nn.Module):
    "One weight, used twice"
    def __init__(self): super().__init__(); self.a,self.b,self.out = nn.Linear(6,6),nn.Linear(6,6),nn.Linear(6,3); self.b.weight = self.a.weight
    def forward(self, x): return self.out(self.b(self.a(x).tanh()).tanh())
class Moody(nn.Module):
    "Branches on a value, which `vmap` refuses"
    def __init__(self): super().__init__(); self.net = tanh_mlp()
    def forward(self, x): return self.net(x)*(2 if x.sum().item()>0 else 1)
class Complex(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.randn(6,3, dtype=torch.complex64))
    def forward(self, x): return (x.to(torch.complex64)@self.w).abs()
class Temperature(nn.Module):
    "A parameter without dimensions"
    def __init__(self): super().__init__(); self.net,self.t = tanh_mlp(),nn.Parameter(torch.tensor(1.5))
    def forward(self, x): return self.net(x)*self.t
class WithMeta(nn.Module):
    "A part on device 'meta' that takes no part"
    def __init__(self, first=False):
        super().__init__()
        if first: self.teacher = nn.Linear(6,3, device='meta')
        self.net = tanh_mlp()
        if not first: self.teacher = nn.Linear(6,3, device='meta')
    def forward(self, x): return self.net(x)
def half_frozen():
    m = tanh_mlp()
    m[0].requires_grad_(False)
    return m
def with_script(): return nn.Sequential(torch.jit.script(nn.Linear(6,8)), nn.Tanh(), nn.Linear(8,3))
probed_models = dict(
    plain=tanh_mlp,
    shared=SharedWeight,
    moody=Moody,
    complex=Complex,
    temperature=Temperature,
    frozen=half_frozen,
    batchnorm=stateful_models['batchnorm'],
    meta=WithMeta,
    meta_first=lambda: WithMeta(True))

@pytest.mark.parametrize('name', probed_models)
@pytest.mark.filterwarnings("ignore:left out, on device 'meta'")
def test_per_sample(name):
    "Norms of single samples against autograd"
    learn = probe_learner(model=probed_models[name])
    b = probe_data(6)
    got = per_sample_norms(learn, 6, batch=b)
    params = [p for p in learn.model.parameters() if p.requires_grad and p.device.type!='meta']
    for m in learn.model.modules():
        if isinstance(m, nn.BatchNorm1d): m.eval()
    np.testing.assert_allclose(got, single_norms(learn, b, params), rtol=1e-5)

@pytest.mark.parametrize('name', [k for k in probed_models if k!='batchnorm'])
@pytest.mark.filterwarnings("ignore:left out, on device 'meta'")
def test_ray(name):
    "At scale 1 loss and gradient are autograd's"
    learn = probe_learner(model=probed_models[name])
    b = probe_data(6)
    df = grad_along_ray(learn, [1.], batch=b)
    loss = F.cross_entropy(learn.model(b[0]), b[1])
    gs = torch.autograd.grad(loss, [p for p in learn.model.parameters() if p.requires_grad and p.device.type!='meta'])
    np.testing.assert_allclose(df[['loss','norm','max_abs']].iloc[0],
                               [loss.item(), sum(g.abs().double().square().sum().item() for g in gs)**.5,
                                max(g.abs().max().item() for g in gs)],
                               rtol=1e-5)

def test_loss_per_sample():
    "`reduction='none'` counts with its mean"
    a,b = probe_learner(loss=F.cross_entropy),probe_learner(loss=functools.partial(F.cross_entropy, reduction='none'))
    xy = probe_data(6)
    np.testing.assert_allclose(grad_along_ray(a, [1,2], batch=xy), grad_along_ray(b, [1,2], batch=xy), rtol=1e-6)
    np.testing.assert_allclose(per_sample_norms(a, 6, batch=xy), per_sample_norms(b, 6, batch=xy), rtol=1e-6)
    assert per_sample_norms(b, 6, batch=xy).attrs['how']=='torch.func.vmap'

def test_meta():
    "What has no values is left out and named; alone it is refused"
    learn = probe_learner(model=WithMeta)
    for f in (random_ray, sample_norms):
        with pytest.warns(UserWarning, match="on device 'meta'.*teacher.weight, teacher.bias"): f(learn)
    for f in (lambda **kw: grad_along_ray(learn, [1], **kw), lambda **kw: per_sample_norms(learn, 2, **kw)):
        with pytest.raises(ValueError, match='teacher.weight.*no values'): f(params='teacher')
    whole = probe_learner()
    whole.model.to('meta')
    with pytest.raises(ValueError, match='no values'): random_ray(whole)

def test_lazy():
    "Weights that wait for their first batch are refused with what to do, and wait on; then all is well"
    learn = probe_learner(model=lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3)))
    for f in (random_ray, sample_norms):
        with pytest.raises(ValueError, match=r'0.weight has no shape.*learn.model\(\*xb\)'): f(learn)
    assert nn.parameter.is_lazy(learn.model[0].weight)
    fit(learn)
    assert len(random_ray(learn))==3 and len(sample_norms(learn))==5

def test_averaged_model():
    "Names without the wrapper's component, numbers of the model inside"
    inner = tanh_mlp()
    wrapped = probe_learner(model=lambda: torch.optim.swa_utils.AveragedModel(inner))
    plain = probe_learner(model=lambda: wrapped.model.module)
    xy = probe_data(6)
    np.testing.assert_array_equal(grad_along_ray(wrapped, [1], params=['0.weight'], batch=xy), grad_along_ray(plain, [1], params=['0.weight'], batch=xy))

@pytest.mark.parametrize('n', [np.int64(4),np.int32(4),np.uint8(4)], ids=repr)
def test_numpy_integers(n):
    "What numpy calls a whole number is one; a numpy boolean is none"
    learn,xy = probe_learner(),probe_data(6)
    assert per_sample_norms(learn, n, batch=xy).equals(per_sample_norms(learn, 4, batch=xy))
    with pytest.raises(ValueError, match='n:'): per_sample_norms(learn, np.bool_(True), batch=xy)

# --- a device without float64

class Apple(Tensor):
    "A tensor on device 'mps', its values elsewhere; as there, nothing is float64"
    @staticmethod
    def __new__(cls, t): return Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype, device='mps', requires_grad=t.requires_grad, strides=t.stride())
    def __init__(self, t): self.t = t.detach()
    def __tensor_flatten__(self): return ['t'],None
    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kw=None):
        kw = dict(kw or {})
        to = kw.get('device')
        if to is not None: kw['device'] = 'cpu'
        if kw.get('dtype') in (torch.float64, torch.complex128) and not (to is not None and torch.device(to).type=='cpu'):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        out = f(*torch.utils._pytree.tree_map_only(Apple, lambda o: o.t, args), **torch.utils._pytree.tree_map_only(Apple, lambda o: o.t, kw))
        if f is torch.ops.aten._local_scalar_dense.default or to is not None and torch.device(to).type=='cpu': return out
        return torch.utils._pytree.tree_map_only(Tensor, lambda o: o if isinstance(o, Apple) else cls(o), out)

def test_apple():
    "The stand-in refuses float64, as the device does"
    g = Apple(torch.randn(5))
    assert g.device.type=='mps' and g.cpu().device.type=='cpu'
    with pytest.raises(TypeError, match='float64'): g.double()

@pytest.mark.parametrize('g',
                         [torch.randn(5, generator=seeded_generator()), torch.tensor([1e30,-2.,0.]), torch.tensor([1.,torch.nan]),
                          torch.randn(3, dtype=torch.complex64, generator=seeded_generator())],
                         ids='plain large nan complex'.split())
def test_statistics_without_float64(g):
    "Every statistic, and `measure`, of a gradient on a device without float64 is that of the same gradient on the CPU"
    np.testing.assert_array_equal([*measure(Apple(g)).values()], [*measure(g).values()])
    for k,f in statistics.items(): np.testing.assert_array_equal(f(Apple(g)).item(), f(g).item())

class Arrived(Tensor):
    "What came over to the CPU"

class No64(TorchDispatchMode):
    "Refuses float64, but of what came over"
    def __torch_dispatch__(self, f, types, args=(), kw=None):
        out = f(*args, **(kw or {}))
        if f is torch.ops.aten.detach.default: return out   # makes no number; torch 2.6 detaches twice, the second time what is not yet `Arrived` again
        leaves = torch.utils._pytree.tree_leaves
        if any(isinstance(o, Tensor) and o.dtype in (torch.float64, torch.complex128) for o in leaves(out)):
            if not any(isinstance(o, Arrived) for o in leaves((args, kw))): raise TypeError(f"{f}: the device doesn't support float64")
        return out

@pytest.mark.parametrize('name', ['plain','moody','complex'])
def test_probes_without_float64(name, monkeypatch):
    "Both probes where nothing is float64 before it is on the CPU; autograd in C++ knows no made-up device, so the CPU plays it"
    learn,xy = probe_learner(model=probed_models[name]),probe_data(6)
    go = lambda: (grad_along_ray(learn, [.5,1,2], batch=xy), grad_along_ray(learn, [.5,1], direction='gradient', batch=xy),
                  per_sample_norms(learn, 5, batch=xy))
    want = go()
    with pytest.raises(TypeError, match='float64'), No64(): go()   # the guard is there
    monkeypatch.setattr(stats, 'has_float64', lambda device: False)
    monkeypatch.setattr(Tensor, 'cpu', lambda t: t.as_subclass(Arrived))
    with No64(): got = go()
    for a,b in zip(want, got): np.testing.assert_array_equal(a, b)
