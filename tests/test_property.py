"Random small networks, trained in random ways: every row is autograd's."
import gc
import numpy as np,pytest,torch
import torch.nn.functional as F
from fastai.basics import *
from fastai.callback.training import GradientAccumulation,GradientClip
from hypothesis import HealthCheck,given,settings,strategies as st
from torch import nn
from fastai_gradstats import GradNormCallback,GradStatsCallback
from helpers.callbacks import ByRows,TrainOnly,read_by
from helpers.oracles import GradSpy,Twin,check_rows,compare_row,owner_names
from helpers.training import fit,loaders

C,T = 3,5   # channels and length of what goes from layer to layer: (batch, C, T)

class LayerInFunction(nn.Module):
    "A layer inside a function that keeps the shape; the function may use it as it likes"
    def __init__(self, f, *ms): super().__init__(); self.f,self.ms = f,nn.ModuleList(ms)
    def forward(self, x): return self.f(x, *self.ms)

class Out(nn.Module):
    "Owns a weight and returns a nest of tensors"
    def __init__(self, f): super().__init__(); self.f,self.w = f,nn.Parameter(torch.linspace(-1,2,T))
    def forward(self, x): return self.f(x*self.w)

class Raw(nn.Module):
    "Owns a weight that no other module uses, and a module that it never calls"
    def __init__(self): super().__init__(); self.w,self.l,self.never = nn.Parameter(torch.ones(())),nn.Linear(T,T),nn.Linear(T,2)
    def forward(self, x): return F.linear(x, self.l.weight)*self.w

def lstm_residual(x, m):
    o,(h,c) = m(x)
    return x + o + h[-1][:,None] + c[0][:,None]
def inplace_residual(x, l):
    o = l(x)
    o += x
    return o
def again(k):
    def f(x, l):
        for _ in range(k): x = F.relu(l(x), inplace=True)
        return x
    return f
def no_grad(x, l):
    with torch.no_grad(): z = l(x)
    return x + z

layer_kinds = dict(
    linear   = lambda: nn.Linear(T,T),
    no_bias  = lambda: nn.Linear(T,T, bias=False),
    big      = lambda: nn.Sequential(nn.Linear(T,600), nn.Tanh(), nn.Linear(600,T)),
    conv1d   = lambda: nn.Conv1d(C,C,3, padding=1),
    conv2d   = lambda: LayerInFunction(lambda x,l: l(x[:,None]).mean(1), nn.Conv2d(1,2,3, padding=1)),
    grouped  = lambda: nn.Conv1d(C,C,1, groups=C),
    bn       = lambda: nn.BatchNorm1d(C),
    ln       = lambda: nn.LayerNorm(T),
    relu     = lambda: nn.Sequential(nn.Linear(T,T), nn.ReLU()),
    relu_    = lambda: nn.Sequential(nn.Conv1d(C,C,1), nn.BatchNorm1d(C), nn.ReLU(inplace=True)),
    dropout  = lambda: nn.Sequential(nn.Linear(T,T), nn.Dropout(.5, inplace=True)),
    lstm     = lambda: LayerInFunction(lstm_residual, nn.LSTM(T,T, 2, batch_first=True)),
    gru      = lambda: LayerInFunction(lambda x,m: m(x)[0], nn.GRU(T,T, batch_first=True)),
    residual = lambda: LayerInFunction(inplace_residual, nn.Linear(T,T)),
    shared   = lambda: LayerInFunction(again(3), nn.Linear(T,T)),
    twice    = lambda: (lambda l: nn.Sequential(l, nn.Tanh(), LayerInFunction(lambda x,m: m(x), l)))(nn.Linear(T,T)),
    tuple_   = lambda: LayerInFunction(lambda x,m: (lambda o: o[0]+o[1][0].sin())(m(x)), Out(lambda x: (x.tanh(), [x*2, 'text', x]))),
    dict_    = lambda: LayerInFunction(lambda x,m: m(x)['b'], Out(lambda x: dict(a=x.exp(), b=x.cos()))),
    chunk    = lambda: LayerInFunction(lambda x,m: torch.cat(m(x)[::-1], 2), Out(lambda x: x.split([2,3], 2))),
    unbind   = lambda: LayerInFunction(lambda x,m: torch.stack(m(x), 1), Out(lambda x: x.unbind(1))),
    max      = lambda: LayerInFunction(lambda x,m: x-m(x)[0], Out(lambda x: x.max(2, keepdim=True))),
    t        = lambda: LayerInFunction(lambda x,m: m(x).transpose(1,2), Out(lambda x: x.transpose(1,2))),
    raw      = Raw,
    unused   = lambda: LayerInFunction(lambda x,l: (l(x), x)[1], nn.Linear(T,T)),
    no_grad  = lambda: LayerInFunction(no_grad, nn.Linear(T,T)),
    detach   = lambda: LayerInFunction(lambda x: x.detach()),
    scaled   = lambda: LayerInFunction(lambda x: x*1e3),
    shrunk   = lambda: LayerInFunction(lambda x: x*1e-6),
)

class RandomNet(nn.Module):
    def __init__(self, layers): super().__init__(); self.layers,self.head = nn.Sequential(*layers),nn.Linear(C*T,2)
    def forward(self, x): return self.head(self.layers(x).flatten(1)).float()

def loss_named(name):
    return dict(ce=F.cross_entropy, sum=lambda o,y: o.sum(), mse=lambda o,y: (o[:,0]-y).square().mean(), large=lambda o,y: F.cross_entropy(o, y)*1e4)[name]

layer = st.tuples(st.sampled_from(sorted(layer_kinds)), st.sampled_from(['free','free','free','frozen','half']))
dtypes = dict(float32=torch.float32, float64=torch.float64, bfloat16=torch.bfloat16)

runs = dict(
    layers=st.lists(layer, min_size=1, max_size=6),
    dtype=st.sampled_from([*dtypes]),
    loss=st.sampled_from(['ce','sum','mse','large']),
    bs=st.integers(2,5),
    n=st.integers(1,5),
    acc=st.sampled_from([1,1,2,3]),
    every=st.sampled_from([1,1,2]),
    threshold=st.sampled_from([1., .01, 0.]),
    epochs=st.integers(1,2),
    path=st.sampled_from(['kernel','blocks','rows']),
    clip=st.booleans(),
    seed=st.integers(0,9),
    opt=st.sampled_from([SGD,Adam]))
bounded = partial(settings, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))

@pytest.mark.slow
@bounded(max_examples=60)
@given(**runs)
def test_random_networks(**kw): train_random(**kw)

@pytest.mark.slow
@bounded(max_examples=600)
@given(**runs)
def test_many_random_networks(**kw): train_random(**kw)

def train_random(layers, dtype, loss, bs, n, acc, every, threshold, epochs, path, clip, seed, opt):
    torch.manual_seed(seed)
    ms = [layer_kinds[k]() for k,_ in layers]
    for m,(_,how) in zip(ms, layers):
        for i,p in enumerate(m.parameters()):
            if how=='frozen' or how=='half' and i%2: p.requires_grad_(False)
    net = RandomNet(ms).to(dtypes[dtype])
    x,y = torch.randn(bs*n,C,T).to(dtypes[dtype]),torch.randint(2, (bs*n,))
    cb,norm,spy = (ByRows if path=='rows' else GradStatsCallback)(every=every, threshold=threshold),GradNormCallback(),GradSpy()
    twin = Twin(loss=lambda l,m: loss_named(loss)(m(*l.xb), *l.yb)/acc)   # as GradientAccumulation divides it
    cbs = [cb,norm,spy,twin,TrainOnly()]
    if acc>1: cbs.append(GradientAccumulation(acc*bs))
    if clip: cbs.append(GradientClip(.1))
    with read_by(path): fit(Learner(loaders(x, y, bs), net, loss_func=loss_named(loss), opt_func=opt, lr=1e-3, cbs=cbs), epochs)
    verify(cb.df, norm, spy, twin, owner_names(net), every, threshold, acc, n*epochs)

def test_nothing_keeps_a_learner():
    "A Learner that nobody holds is collected, with its graph, though its last loss had hooks"
    gc.collect()
    before = sum(isinstance(o, Learner) for o in gc.get_objects())
    train_random([('tuple_','free')], 'float32', 'ce', bs=3, n=2, acc=1, every=1, threshold=1., epochs=1, path='kernel', clip=False, seed=0, opt=SGD)
    gc.collect()
    assert sum(isinstance(o, Learner) for o in gc.get_objects())==before

def verify(df, norm, spy, twin, names, every, threshold, acc, its):
    "Each recorded iteration and step, and only those"
    out,par = df[df['kind']=='output'],df[df['kind']=='param']
    assert sorted(twin.grads)==list(range(its)) and len(spy.grads)==its//acc
    for i,want in twin.grads.items():
        d = out[out['iteration']==i]
        if i%every: assert not len(d)
        else: check_rows(d, want, names, threshold)
        assert (d['step']==i//acc).all()
    for s,gs in enumerate(spy.grads):
        d = par[par['step']==s]
        assert list(d['name'])==([] if s%every else list(gs)) and (d['iteration']==s*acc+acc-1).all()
        for r in d.to_dict('records'): compare_row(r, gs[r['name']], threshold)
    np.testing.assert_allclose(norm.norms, spy.norms, rtol=1e-5)
    assert set(par['step'])<=set(range(len(spy.grads)))
