"What a gradient may be: every dtype and layout, from the smallest to the largest number, and beyond."
import warnings
import matplotlib.pyplot as plt
import numpy as np,pytest,torch,torchvision.models as tv
import torch.nn.functional as F
from fastai.basics import *
from torch import nn
from fastai_gradstats import GradNormCallback,GradStatsCallback,plot_grad_flow,plot_grad_heatmap,plot_grad_log10,plot_grad_norm
from helpers.callbacks import ByRows,TrainOnly,read_by
from helpers.loops import WithoutSteps
from helpers.models import FunctionNet,FunctionWithWeight,HasGradient,InjectGradient,random_pictures,random_vectors
from helpers.oracles import GradSpy,check_batch,check_params,compare_row,names_of_kind
from helpers.training import (
    both_callbacks, fit, image_learner, loaders, row_names, rows_of, tanh_mlp, trained_alike, trained_bits, vector_data,
    vector_learner, wrapped_sgd)

# --- dtypes, memory formats, strides

@pytest.mark.parametrize('dtype', (torch.float64, torch.float16, torch.bfloat16))
def test_dtypes(dtype):
    net = nn.Sequential(nn.Linear(64,128), nn.ReLU(), nn.Linear(128,40), nn.LayerNorm(40), nn.Linear(40,3)).to(dtype)
    check_batch(net, *random_vectors(32, 64, dtype), loss=lambda o,y: F.cross_entropy(o.float(), y))
    # two dtypes in one model
    check_batch(nn.Sequential(nn.Linear(64,40).to(dtype), FunctionNet(lambda s,x: x.float()), nn.Linear(40,3)), *random_vectors(8, 64, dtype))

def test_channels_last():
    m = tv.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    net = FunctionNet(lambda s,x: s.m(x.contiguous(memory_format=torch.channels_last)), m=m)
    grad = []
    m.layer1[0].bn1.register_forward_hook(lambda m,i,o: o.register_hook(grad.append) and None)
    check_batch(net, *random_pictures())
    assert any(g.is_contiguous(memory_format=torch.channels_last) and not g.is_contiguous() for g in grad)

def test_strange_layouts():
    "Gradients with holes, transposed, expanded, of one element, of no dimension."
    def f(s, x):
        x = s.l(x)
        a,b = s.t(x.t()),s.e(x)[:,::2]
        return a.t().sum(1).mean()+b.square().mean()+s.z(x.mean())*s.o(x[:1,:1]).sum()
    net = FunctionNet(f, l=nn.Linear(4,6), t=FunctionWithWeight(lambda w,x: x*w[:,None], 6),
                      e=FunctionWithWeight(lambda w,x: x*w, 6), z=FunctionWithWeight(lambda w,x: x*w.sum(), 1),
                      o=FunctionWithWeight(lambda w,x: x*w, 1))
    df = check_batch(net, *random_vectors(300), loss=lambda o,y: o, n_rows=5)
    assert df.set_index('name')['numel'][['z','o']].tolist()==[1,1]

@pytest.mark.parametrize('n', (3, 700, 70_000))
def test_stride_0(n):
    "`sum` hands on one number that is seen many times."
    net = FunctionNet(lambda s,x: s.h(s.l(x)), l=nn.Linear(2,4), h=FunctionWithWeight(lambda w,x: x*w))
    strides = []
    net.h.register_forward_hook(lambda m,i,o: o.register_hook(lambda g: strides.append(g.stride())) and None)
    df = check_batch(net, *random_vectors(n, 2), loss=lambda o,y: o.sum())
    assert strides[-1]==(0,0) and df.set_index('name').loc['h',['max_abs','mean','std']].tolist()==[1,1,0]

def test_empty_and_0d_parameters():
    "A parameter of no elements has a row of zeros, one of no dimension is an element."
    def f(s, x): return s.l(x)*s.scale + s.none.sum() + torch.cat([s.e(x),x[:,:3]], 1)
    net = FunctionNet(f, l=nn.Linear(4,3), e=nn.Linear(4,0), scale=nn.Parameter(torch.tensor(2.)), none=nn.Parameter(torch.empty(0,5)))
    df = check_batch(net, *random_vectors())
    n = df[df['kind']=='param'].set_index('name')['numel']
    assert n.to_dict()==dict(scale=1, none=0)|{'l.weight':12, 'l.bias':3, 'e.weight':0, 'e.bias':0}
    assert df.set_index('name').loc['e','numel']==0

def test_empty_batch_part():
    "A module that got no samples this time."
    net = FunctionNet(lambda s,x: torch.cat([s.a(x[x[:,0]>100]), s.b(x)]), a=nn.Linear(4,3), b=nn.Linear(4,3))
    assert check_batch(net, *random_vectors()).set_index('name').loc['a','numel']==0

@pytest.mark.parametrize('seen', ([1,1,5,2], [0,0,0,0], list(range(10))))
def test_sparse_embedding(seen):
    "A sparse gradient is the dense one, with the zeros that are not stored; an index seen twice counts once."
    net = nn.Sequential(nn.Embedding(10,3, sparse=True), nn.Flatten(), nn.Linear(3,4))
    x = torch.tensor(seen)[:,None]
    df = check_batch(net, x, torch.randint(4, (len(x),)), opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
    row = df.set_index('name').loc['0.weight']
    assert row['numel']==30 and row['zeros']==3*(10-len(set(seen)))

def test_complex():
    "Complex weights and outputs: absolute values are moduli, the mean is its real part."
    net = FunctionNet(lambda s,x: s.h((s.c(x.to(torch.complex64)*s.w)).abs()), c=nn.Linear(4,4, dtype=torch.complex64),
                      w=nn.Parameter(torch.randn(4, dtype=torch.complex64)), h=nn.Linear(4,3))
    df = check_batch(net, *random_vectors())
    assert {'w','c.weight'}<=names_of_kind(df, 'param')

# --- layouts

def as_csr(w): return w.to_sparse_csr()
class Adjacency(nn.Module):
    "A sparse output"
    def __init__(self, layout): super().__init__(); self.layout,self.w = layout,nn.Parameter(torch.rand(8,8))
    def forward(self): return self.w.to_sparse() if self.layout is torch.sparse_coo else self.w.to_sparse_csr()

def graph_net(layout): return lambda: FunctionNet(lambda s,x: s.h(torch.sparse.mm(s.e(), s.a(x))), a=nn.Linear(6,8), e=Adjacency(layout), h=nn.Linear(8,3))
def pruned_net():
    w = torch.linspace(-1, 1, 48).view(8,6)
    return FunctionNet(lambda s,x: s.h(torch.sparse.mm(s.w, x.t()).t()), w=nn.Parameter((w*(w.abs()>.5)).to_sparse_csr()), h=nn.Linear(8,3))
def packed_net(layout):
    def f(s, x):
        make = torch.nested.nested_tensor if layout is torch.strided else torch.nested.as_nested_tensor
        parts = make([x[:3],x[3:]], layout=layout)
        return torch.cat(list(s.h(s.a(parts).relu()).unbind()))
    return lambda: FunctionNet(f, a=nn.Linear(6,8), h=nn.Linear(8,3))
layout_models = dict(
    coo=graph_net(torch.sparse_coo),
    csr=graph_net(torch.sparse_csr),
    csr_weight=pruned_net,
    nested=packed_net(torch.strided),
    jagged=packed_net(torch.jagged))

@pytest.mark.filterwarnings('ignore:Sparse', 'ignore:The PyTorch API of nested')
@pytest.mark.parametrize('cls', (GradStatsCallback,ByRows))
@pytest.mark.parametrize('path', ('kernel','blocks'))
@pytest.mark.parametrize('layout', layout_models)
def test_layouts(layout, path, cls):
    "Trains the same; each parameter row is what the optimizer got, each output row the dense gradient of the same elements."
    with read_by(path): learn,said = trained_alike(layout_models[layout], cls(), (spy := GradSpy()), opt_func=wrapped_sgd)
    assert said==[]
    check_params(rows_of(learn, 'param'), spy)
    n = rows_of(learn).query('iteration==0').set_index('name')['numel'].to_dict()
    want = dict(coo=dict(a=64, e=64, h=24), csr=dict(a=64, e=64, h=24), csr_weight={'(model)':24,'h':24},
                nested=dict(a=64, h=24), jagged=dict(a=64, h=24))
    assert n==want[layout]

@pytest.mark.filterwarnings('ignore:Sparse', 'ignore:The PyTorch API of nested')
def test_nested_values():
    "Rows of a nested run are those of the same samples in one tensor."
    a,_ = trained_alike(packed_net(torch.strided))
    b,_ = trained_alike(packed_net(torch.jagged))
    c,_ = trained_alike(lambda: FunctionNet(lambda s,x: s.h(s.a(x).relu()), a=nn.Linear(6,8), h=nn.Linear(8,3)))
    for learn in (a,b):
        for col in ('norm','max_abs','mean','std'): np.testing.assert_allclose(rows_of(learn)[col], rows_of(c)[col], rtol=1e-4, atol=1e-9)

@pytest.mark.filterwarnings('ignore:Sparse')
def test_sparse_weight_values():
    "A CSR weight's gradient, its norm, and g·w, against the same weight dense."
    learn,_ = trained_alike(pruned_net, opt_func=wrapped_sgd)
    x,y = vector_data()
    model = pruned_net()
    set_seed(0)
    d = learn.grad_stats.select(kind='param', name='w').df.iloc[0]
    fresh = vector_learner(pruned_net, opt_func=wrapped_sgd).model
    w = fresh.w.detach().to_dense().requires_grad_()
    F.cross_entropy(fresh.h((w@x[:8].t()).t()), y[:8]).backward()
    kept = fresh.w.detach().to_dense()!=0
    g = w.grad*kept
    np.testing.assert_allclose(d['norm'], g.norm(), rtol=1e-5)
    assert d['numel']==48 and d['zeros']==int((~kept).sum())
    p = learn.grad_norm.by('param').query("name=='w'").iloc[0]
    np.testing.assert_allclose([p['weight_norm'],p['dot']], [(w*kept).norm().item(), (g*w).sum().item()], rtol=1e-5)

# --- a gradient that cannot be read

class OpaqueTensor(Tensor):
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
    order = GradSpy.order+.05   # right before ours
    def before_step(self):
        self.kept = self.learn.model[0].weight.grad
        self.learn.model[0].weight.grad = None
        self.learn.model[0].weight.grad = OpaqueTensor(self.kept)
class Home(Callback):
    order = 900
    def before_step(self): self.learn.model[0].weight.grad = None; self.learn.model[0].weight.grad = self.learn.foreign.kept

def test_wrapper_subclass():
    "A gradient that cannot be read has no row, one sentence names it, the others are there; so for norms alone."
    learn,said = trained_alike(tanh_mlp, Foreign(), Home())
    assert '0.weight' not in row_names(learn, 'param') and len(row_names(learn, 'param'))==3
    unread = [s for s in said if 'could not be read' in s]
    assert len(unread)==1 and "'0.weight'" in unread[0]   # the other sentence: `Foreign` acts before the reading
    with pytest.warns(UserWarning, match="'0.weight' could not be read") as w:
        trained_bits(tanh_mlp, norm := GradNormCallback(), Foreign(), Home(), spy := GradSpy())
    others = [np.sqrt(sum((g**2).sum() for n,g in gs.items() if n!='0.weight')) for gs in spy.grads]
    np.testing.assert_allclose(norm.norms, others, rtol=1e-5)

# --- from the smallest to the largest number, and beyond

def check_gradient(g):
    "Rows of a model with this gradient, from both engines"
    for cls in (ByRows,GradStatsCallback): res = check_gradient_with(g, cls())
    return res

def check_gradient_with(g, cb):
    net = FunctionNet(lambda s,x: s.m(x), m=HasGradient(g))
    loss = lambda o,y: InjectGradient.apply(o, g)
    norm = GradNormCallback()
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        fit(Learner(loaders(torch.zeros(2,1), torch.zeros(2)), net, loss_func=loss, opt_func=SGD, lr=0., cbs=[cb,norm,TrainOnly()]))
    df = cb.df
    assert df['name'].tolist()==['m','m.w']
    for r in df.to_dict('records'): compare_row(r, g.double().numpy())
    return df,norm

@pytest.mark.parametrize('n', (1, 7, 1000, 5000, 300_000))
@pytest.mark.parametrize('e', (-44, -38, -30, -20, -8, 0, 8, 18, 30, 38))
def test_magnitudes(e, n):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=g).clamp(-3,3)*.9
    df,norm = check_gradient((x.double()*10.**e).float())
    np.testing.assert_allclose(norm.norms[0], float((x.double()*10.**e).float().double().norm()), rtol=1e-5)

@pytest.mark.parametrize('n', (5, 3000, 300_000))
@pytest.mark.parametrize('kind', ('spike','wide','shifted','sparse','negative','signs','edge','subnormal'))
def test_shapes_of_distributions(kind, n):
    "One huge element, 76 decades at once, a mean far from 0, nearly all zeros, elements on the threshold."
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=g)
    shapes = dict(spike=lambda: x.mul(1e-6).index_fill(0, torch.tensor([n//2]), 1e30),
                  wide=lambda: torch.sign(x)*10**(torch.rand(n, generator=g).double()*76-38),
                  shifted=lambda: 1000+x*1e-2,
                  sparse=lambda: x*(torch.arange(n)%997==3),
                  negative=lambda: -x.abs(),
                  signs=lambda: x.sign(),
                  edge=lambda: torch.tensor([1., 1.0000001, .99999994, -1., -1.0000001]).repeat(n//5),
                  subnormal=lambda: x*1e-40)
    x = shapes[kind]()
    check_gradient(x.float())

@pytest.mark.parametrize('n', (4, 3000, 300_000))
@pytest.mark.parametrize('bad', ([torch.nan], [torch.inf], [-torch.inf], [torch.inf,-torch.inf], [torch.nan,torch.inf], [3e38]*3))
@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
def test_not_finite(bad, n, dtype):
    "Nothing is dropped: counted, and NaN or inf as IEEE gives. Numbers near the largest of float32 are finite."
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    x[-len(bad):] = torch.tensor(bad, dtype=dtype)
    check_gradient(x)

@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16, torch.float64))
@pytest.mark.parametrize('n', (7, 5000, 300_000))
def test_extremes_of_dtypes(dtype, n):
    i = torch.finfo(dtype)
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).to(dtype)
    big,tiny = (min(i.max, 1e30),max(i.tiny, 1e-30))
    for v in (big,tiny): check_gradient(torch.cat([x, torch.tensor([v,-v], dtype=dtype)]))
    check_gradient(torch.cat([x, torch.tensor([torch.inf], dtype=dtype)]))

@pytest.mark.parametrize('cls', (GradStatsCallback,ByRows))
@pytest.mark.parametrize('n', (3, 5000, 300_000))
@pytest.mark.parametrize('v', (1e300, 1e40, -1e40, 1e-60, -1e-300))
def test_beyond_float32(v, n, cls):
    "Numbers in float64 that float32 has not: 0 or inf in the float columns (`std` may be NaN where squares leave float64), counts are exact."
    x = (torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))+1)*v
    cb,norm = cls(),GradNormCallback()
    fit(Learner(loaders(torch.zeros(2,1), torch.zeros(2)), HasGradient(x), loss_func=lambda o,y: InjectGradient.apply(o, x),
                opt_func=SGD, lr=0., cbs=[cb,norm,TrainOnly()]))
    df,reads = cb.df,np.inf if abs(v)>1 else 0
    assert df['kind'].tolist()==['output','param'] and (df[['max_abs','mean_abs','norm']].to_numpy()==reads).all() and (df['mean']==np.sign(v)*reads).all()
    assert (df['std']==0).all() if reads==0 else not np.isfinite(df['std']).any()
    assert (df[['numel','zeros','nonfinite','above']].to_numpy()==[n, 0, 0, n if reads else 0]).all()
    np.testing.assert_allclose(norm.norms, [reads if '300' in f'{v}' else np.linalg.norm(x.numpy())], rtol=1e-5)   # sums of squares, in float64

def test_plots_of_extremes():
    "Every plot draws a record that holds the smallest and the largest number, zeros, inf and NaN."
    class Scale(Callback):
        order = 5
        def before_backward(self): self.learn.loss_grad = self.loss_grad*[1e-38, 1e36, 0., torch.inf, torch.nan, 1.][self.iter]
    with np.errstate(all='raise'): learn = fit(image_learner(cbs=[*both_callbacks(), Scale()], n=96, cls=WithoutSteps))
    m = learn.grad_norm.df['norm'].tolist()
    assert 0<m[0]<1e-35 and m[1]>1e34 and m[2]==0 and not np.isfinite(m[3:5]).any() and np.isfinite(m[5])
    for f in (plot_grad_log10, plot_grad_heatmap, plot_grad_norm, *(partial(plot_grad_flow, iteration=i) for i in range(6))):
        ax = f(learn)
        ax.figure.canvas.draw()
        plt.close('all')
