"Random small networks, trained in random ways: every row is autograd's."
import numpy as np,pytest,torch
import torch.nn.functional as F
from fastai.basics import *
from fastai.callback.training import GradientAccumulation,GradientClip
from hypothesis import HealthCheck,given,settings,strategies as st
from torch import nn

from fastai_gradstats import GradNormCallback,GradStatsCallback
from oracles import ByRows,Spy,TrainOnly,Twin,by,check_outputs,check_params,check_rows,compare,fit,loaders,owners

del test,test_close,test_eq,test_eq_type,test_fail,test_fig_exists,test_is,test_ne,test_set,test_shuffled,test_sig,test_stdout,test_warns   # fastcore's, which fastai exports and pytest would collect

C,T = 3,5   # channels and length of what goes from layer to layer: (batch, C, T)

class Wrap(nn.Module):
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

def lstm(x, m):
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

kinds = dict(
    linear   = lambda: nn.Linear(T,T),
    no_bias  = lambda: nn.Linear(T,T, bias=False),
    big      = lambda: nn.Sequential(nn.Linear(T,600), nn.Tanh(), nn.Linear(600,T)),
    conv1d   = lambda: nn.Conv1d(C,C,3, padding=1),
    conv2d   = lambda: Wrap(lambda x,l: l(x[:,None]).mean(1), nn.Conv2d(1,2,3, padding=1)),
    grouped  = lambda: nn.Conv1d(C,C,1, groups=C),
    bn       = lambda: nn.BatchNorm1d(C),
    ln       = lambda: nn.LayerNorm(T),
    relu     = lambda: nn.Sequential(nn.Linear(T,T), nn.ReLU()),
    relu_    = lambda: nn.Sequential(nn.Conv1d(C,C,1), nn.BatchNorm1d(C), nn.ReLU(inplace=True)),
    dropout  = lambda: nn.Sequential(nn.Linear(T,T), nn.Dropout(.5, inplace=True)),
    lstm     = lambda: Wrap(lstm, nn.LSTM(T,T, 2, batch_first=True)),
    gru      = lambda: Wrap(lambda x,m: m(x)[0], nn.GRU(T,T, batch_first=True)),
    residual = lambda: Wrap(inplace_residual, nn.Linear(T,T)),
    shared   = lambda: Wrap(again(3), nn.Linear(T,T)),
    twice    = lambda: (lambda l: nn.Sequential(l, nn.Tanh(), Wrap(lambda x,m: m(x), l)))(nn.Linear(T,T)),
    tuple_   = lambda: Wrap(lambda x,m: (lambda o: o[0]+o[1][0].sin())(m(x)), Out(lambda x: (x.tanh(), [x*2, 'text', x]))),
    dict_    = lambda: Wrap(lambda x,m: m(x)['b'], Out(lambda x: dict(a=x.exp(), b=x.cos()))),
    chunk    = lambda: Wrap(lambda x,m: torch.cat(m(x)[::-1], 2), Out(lambda x: x.split([2,3], 2))),
    unbind   = lambda: Wrap(lambda x,m: torch.stack(m(x), 1), Out(lambda x: x.unbind(1))),
    max      = lambda: Wrap(lambda x,m: x-m(x)[0], Out(lambda x: x.max(2, keepdim=True))),
    t        = lambda: Wrap(lambda x,m: m(x).transpose(1,2), Out(lambda x: x.transpose(1,2))),
    raw      = Raw,
    unused   = lambda: Wrap(lambda x,l: (l(x), x)[1], nn.Linear(T,T)),
    no_grad  = lambda: Wrap(no_grad, nn.Linear(T,T)),
    detach   = lambda: Wrap(lambda x: x.detach()),
    scaled   = lambda: Wrap(lambda x: x*1e3),
    shrunk   = lambda: Wrap(lambda x: x*1e-6),
)

class Net(nn.Module):
    def __init__(self, layers): super().__init__(); self.layers,self.head = nn.Sequential(*layers),nn.Linear(C*T,2)
    def forward(self, x): return self.head(self.layers(x).flatten(1)).float()

def losses(name):
    return dict(ce=F.cross_entropy, sum=lambda o,y: o.sum(), mse=lambda o,y: (o[:,0]-y).square().mean(), large=lambda o,y: F.cross_entropy(o, y)*1e4)[name]

layer = st.tuples(st.sampled_from(sorted(kinds)), st.sampled_from(['free','free','free','frozen','half']))
dtypes = dict(float32=torch.float32, float64=torch.float64, bfloat16=torch.bfloat16)

runs = dict(layers=st.lists(layer, min_size=1, max_size=6), dtype=st.sampled_from([*dtypes]), loss=st.sampled_from(['ce','sum','mse','large']), bs=st.integers(2,5), n=st.integers(1,5), acc=st.sampled_from([1,1,2,3]),
            every=st.sampled_from([1,1,2]), threshold=st.sampled_from([1., .01, 0.]), epochs=st.integers(1,2), path=st.sampled_from(['kernel','blocks','rows']), clip=st.booleans(), seed=st.integers(0,9), opt=st.sampled_from([SGD,Adam]))
bounded = partial(settings, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))

@bounded(max_examples=60)
@given(**runs)
def test_random_networks(**kw): run(**kw)

@pytest.mark.slow
@bounded(max_examples=600)
@given(**runs)
def test_many_random_networks(**kw): run(**kw)

def run(layers, dtype, loss, bs, n, acc, every, threshold, epochs, path, clip, seed, opt):
    torch.manual_seed(seed)
    ms = [kinds[k]() for k,_ in layers]
    for m,(_,how) in zip(ms, layers):
        for i,p in enumerate(m.parameters()):
            if how=='frozen' or how=='half' and i%2: p.requires_grad_(False)
    net = Net(ms).to(dtypes[dtype])
    x,y = torch.randn(bs*n,C,T).to(dtypes[dtype]),torch.randint(2, (bs*n,))
    cb,norm,spy = (ByRows if path=='rows' else GradStatsCallback)(every=every, threshold=threshold),GradNormCallback(),Spy()
    twin = Twin(loss=lambda l,m: losses(loss)(m(*l.xb), *l.yb)/acc)   # as GradientAccumulation divides it
    cbs = [cb,norm,spy,twin,TrainOnly()]
    if acc>1: cbs.append(GradientAccumulation(acc*bs))
    if clip: cbs.append(GradientClip(.1))
    with by(path): fit(Learner(loaders(x, y, bs), net, loss_func=losses(loss), opt_func=opt, lr=1e-3, cbs=cbs), epochs)
    verify(cb.df, norm, spy, twin, owners(net), every, threshold, acc, n*epochs)

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
        for r in d.to_dict('records'): compare(r, gs[r['name']], threshold)
    np.testing.assert_allclose(norm.norms, spy.norms, rtol=1e-5)
    assert set(par['step'])<=set(range(len(spy.grads)))
