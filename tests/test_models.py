"Every output and parameter gradient of many architectures, each equal to autograd's."
import warnings
from collections import namedtuple,OrderedDict
from dataclasses import dataclass

import numpy as np,pytest,torch,torchvision.models as tv
import torch.nn.functional as F
from fastai.basics import *
from torch import nn
from torchvision.models.convnext import CNBlockConfig,ConvNeXt

from fastai_gradstats import GradNormCallback,GradStatsCallback
from oracles import ByRows,Seed,Spy,TrainOnly,check_params,check_rows,compare,fit,loaders,output_grads,owners

del test,test_close,test_eq,test_eq_type,test_fail,test_fig_exists,test_is,test_ne,test_set,test_shuffled,test_sig,test_stdout,test_warns   # fastcore's, which fastai exports and pytest would collect

def pictures(n=4, size=32, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n,3,size,size, generator=g, dtype=dtype),torch.randint(10, (n,), generator=g)

def check(model, x, y, loss=F.cross_entropy, listed=None, opt_func=SGD, n_rows=None):
    "One training batch; `listed` names modules to record instead of those that own a parameter. Returns the frame"
    mods = {n or '(model)':m for n,m in model.named_modules()}
    names = [n for n in mods if n in listed] if listed else owners(model)
    model.train()
    torch.manual_seed(7)
    want = output_grads(model, lambda m: loss(m(x), y), names)
    cb,norm,spy = GradStatsCallback(modules=[mods[n] for n in names] if listed else None),GradNormCallback(),Spy()
    fit(Learner(loaders(x, y), model, loss_func=loss, opt_func=opt_func, lr=1e-3, cbs=[cb,norm,spy,Seed(),TrainOnly()]))
    df = cb.df
    assert want and (n_rows is None or len(want)==n_rows)
    check_rows(df[df['kind']=='output'], want, names)
    if not listed: check_params(df, spy, norm.norms)
    return df

def names(df, kind): return set(df.loc[df['kind']==kind,'name'])

# --- torchvision

def aux_loss(o, y): return sum(F.cross_entropy(t, y)*w for t,w in zip([o] if isinstance(o, Tensor) else o.values() if isinstance(o, dict) else o, (1,.4,.3)))
def pixel_loss(o, y): return aux_loss({k:t.mean((2,3)) for k,t in o.items()}, y)

def vit(): return tv.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10, dropout=.1, attention_dropout=.1)
def swin(): return tv.SwinTransformer(patch_size=[4,4], embed_dim=16, depths=[2,2], num_heads=[2,2], window_size=[4,4], num_classes=10)
def convnext(): return ConvNeXt([CNBlockConfig(16,32,1), CNBlockConfig(32,None,2)], stochastic_depth_prob=.3, layer_scale=.1, num_classes=10)

small = dict(resnet18=tv.resnet18, densenet121=tv.densenet121, mobilenet_v3_small=tv.mobilenet_v3_small, efficientnet_b0=tv.efficientnet_b0, shufflenet=tv.shufflenet_v2_x0_5, squeezenet=tv.squeezenet1_1)
small = {k:partial(f, num_classes=10) for k,f in small.items()} | dict(vit=vit, swin=swin, convnext=convnext)

def randomise(model):
    "No weight that is zero at first (ViT's head, say) hides a gradient"
    torch.manual_seed(0)
    for p in model.parameters():
        with torch.no_grad(): p.add_(torch.randn_like(p)*.02)
    return model

slow = 'vgg11_bn','inception_v3','fcn'
def some(names): return pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names])

@some(small)
def test_torchvision(name): check(randomise(small[name]()), *pictures(size=64 if name=='squeezenet' else 32))

aux = dict(googlenet=(partial(tv.googlenet, num_classes=10, aux_logits=True, init_weights=False), 64, aux_loss),
           lraspp=(partial(tv.segmentation.lraspp_mobilenet_v3_large, weights_backbone=None, num_classes=10), 64, pixel_loss),
           fcn=(partial(tv.segmentation.fcn_resnet50, weights_backbone=None, num_classes=10, aux_loss=True), 32, pixel_loss),
           vgg11_bn=(partial(tv.vgg11_bn, num_classes=10, init_weights=False), 32, F.cross_entropy),
           inception_v3=(partial(tv.inception_v3, num_classes=10, aux_logits=True, init_weights=False), 299, aux_loss))

@some(aux)
def test_several_outputs(name):
    "Auxiliary heads and dicts: each tensor of the root's output too."
    f,size,loss = aux[name]
    model,(x,y) = f(),pictures(2, size)
    if name=='inception_v3': model,x,loss = model.double(),x.double(),lambda o,y: aux_loss(o, y).float()   # 94 convolutions in float32 leave 1e-5 between any two routes
    df = check(model, x, y, loss)
    if name=='vgg11_bn': return
    outs = dict(googlenet=3, lraspp=1, fcn=2, inception_v3=2)[name]
    check(model, x, y, loss, listed=['(model)'], n_rows=outs)
    assert any('aux' in n.lower() for n in names(df, 'output'))==(outs>1)

def test_engine_of_a_gpu(monkeypatch):
    monkeypatch.setitem(globals(), 'GradStatsCallback', ByRows)
    check(small['resnet18'](), *pictures())
    check(randomise(small['swin']()), *pictures())

def test_attention_projections():
    "Attention calls functions with its projections' weights: those modules never run and have parameter rows only."
    for model,ps in (vit(),['out_proj']),(swin(),['qkv','proj']):
        df = check(randomise(model), *pictures())
        out,par = names(df, 'output'),names(df, 'param')
        quiet = [n for n,m in model.named_modules() if n.split('.')[-1] in ps and 'features.0' not in n]
        assert len(quiet)>=2 and not out & set(quiet) and {f'{n}.weight' for n in quiet}<=par
        assert {n for n in owners(model) if n not in quiet}==out

def test_relu_used_twice():
    "torchvision's BasicBlock uses one in-place ReLU twice: two rows, in the order of forward."
    m = tv.resnet18(num_classes=10)
    df = check(m, *pictures(), listed=[n for n,o in m.named_modules() if isinstance(o, nn.ReLU)], n_rows=17)
    assert df.loc[df['name']=='layer1.0.relu','call'].tolist()==[0,1]

@some(('resnet18','densenet121','mobilenet_v3_small'))
def test_every_module(name):
    "Each module listed: blocks, in-place activations, pools, the root."
    m = small[name]()
    check(m, *pictures(2), listed=[n or '(model)' for n,_ in m.named_modules()])

# --- what modules return, and how they are used

class Net(nn.Module):
    "A model from a function of itself and its input; keywords become submodules and parameters"
    def __init__(self, forward, **kw):
        super().__init__()
        self.f = forward
        for k,v in kw.items(): setattr(self, k, v)
    def forward(self, x): return self.f(self, x)

class Fn(nn.Module):
    "A function with a parameter of its own"
    def __init__(self, f, n=4): super().__init__(); self.f,self.w = f,nn.Parameter(torch.linspace(.5,1.5,n))
    def forward(self, *args): return self.f(self.w, *args)

Pair = namedtuple('Pair', 'a b')
@dataclass
class Data: a:object; b:object = None

def vectors(n=6, d=4, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(n,d, dtype=dtype),torch.randint(3, (n,))

def sq(o, y): return (o*o).mean()
def leaves(o): return [t for v in (o.values() if isinstance(o, dict) else [o.a,o.b] if isinstance(o, (Data,Pair)) else o) for t in ([v] if isinstance(v, Tensor) else leaves(v))] if not isinstance(o, (int,str,type(None))) else []
def total(o, y=None): return sum((i+1)*(t*t).sum() for i,t in enumerate(leaves(o)))

nests = dict(tuple=lambda a,b: (a,b), list=lambda a,b: [a,b], dict=lambda a,b: dict(x=a, y=b), ordered=lambda a,b: OrderedDict({'y.1':a, 'x':b}), namedtuple=Pair, dataclass=Data,
             deep=lambda a,b: (a, dict(k=[b, 3, None], j=Data(a*b)), ('s', Pair(a+b, a.detach()))), same=lambda a,b: (a,a), ints=lambda a,b: (a.argmax(1), a, b), one=lambda a,b: (a,), empty=lambda a,b: (a, (), {}, [b]))

@pytest.mark.parametrize('nest', nests)
def test_nested(nest):
    "`out` is the tensor's place among the leaves, whatever they are."
    f = nests[nest]
    net = Net(lambda s,x: s.m(s.l(x)), l=nn.Linear(4,4), m=Fn(lambda w,x: f(x*w, x.tanh()+w)))
    diff = lambda o,y: sum((i+1)*(t*t).sum() for i,t in enumerate(leaves(o)) if t.requires_grad)
    df = check(net, *vectors(), loss=diff)
    outs = df.loc[(df['name']=='m'),'out'].tolist()
    assert outs==dict(deep=[0,1,4,7], ints=[1,2], one=[0]).get(nest, [0,1])

@pytest.mark.parametrize('rnn', (nn.LSTM, nn.GRU, nn.RNN))
@pytest.mark.parametrize('use', ('output','state','all'))
def test_rnn(rnn, use):
    "A state that is not used has no row."
    def f(s, x):
        o,h = s.r(s.l(x))
        return dict(output=[o], state=[h], all=[o,h])[use]
    net = Net(f, l=nn.Linear(4,3), r=rnn(3,5, num_layers=2, dropout=.3, batch_first=True))
    torch.manual_seed(0)
    df = check(net, torch.randn(3,7,4), torch.zeros(3), loss=total)
    n = 3 if rnn is nn.LSTM else 2
    assert df.loc[df['name']=='r','out'].tolist()==dict(output=[0], state=list(range(1,n)), all=list(range(n)))[use]

def test_packed_sequence():
    "A `PackedSequence` is a tuple whose second tensor has no gradient."
    def f(s, x):
        p,_ = s.r(nn.utils.rnn.pack_padded_sequence(x, [5,3,2], batch_first=True))
        return s.l(p.data)
    torch.manual_seed(0)
    check(Net(f, l=nn.Linear(3,2), r=nn.LSTM(4,3)), torch.randn(3,5,4), torch.zeros(3), loss=sq, n_rows=2)

splits = dict(chunk=lambda x: x.chunk(2, 1), unbind=lambda x: x.unbind(1), split=lambda x: x.split([1,3], 1), max=lambda x: x.max(1), svd=lambda x: torch.linalg.svd(x, full_matrices=False), var_mean=lambda x: torch.var_mean(x, 1))

@pytest.mark.parametrize('split', splits)
def test_views(split):
    "Several views of one tensor, and torch's own named tuples."
    net = Net(lambda s,x: s.m(s.l(x)), l=nn.Linear(4,4), m=Fn(lambda w,x: splits[split](x*w)))
    n = dict(unbind=4, svd=3, max=1).get(split, 2)
    check(net, *vectors(), loss=lambda o,y: sum(t.abs().sum()*(i+1) for i,t in enumerate(o) if t.requires_grad), n_rows=1+n)

@pytest.mark.parametrize('split', splits)
def test_views_of_which_one_is_used(split):
    "The others have no gradient (autograd calls their hooks with None) and no row."
    net = Net(lambda s,x: s.m(s.l(x)), l=nn.Linear(4,4), m=Fn(lambda w,x: splits[split](x*w)))
    check(net, *vectors(), loss=lambda o,y: o[0].abs().sum(), n_rows=2)

@pytest.mark.parametrize('k', (1,2,5))
def test_called_k_times(k):
    "`call` counts in the order of forward; what is done to one call does not touch another."
    def f(s, x):
        for i in range(k): x = F.relu(s.l(x), inplace=True)*(i+1)
        return s.h(x)
    df = check(Net(f, l=nn.Linear(4,4), h=nn.Linear(4,3)), *vectors(), n_rows=k+1)
    assert df.loc[df['name']=='l','call'].tolist()==list(range(k))

def test_calls_without_gradient():
    "A call under `no_grad`, and one whose output the loss does not need: no row. The second is counted, since it might have had one."
    def f(s, x):
        with torch.no_grad(): z = s.l(x)
        s.l(x+z)
        return s.l(x*z)
    df = check(Net(f, l=nn.Linear(4,4)), *vectors(), n_rows=1)
    assert df.loc[df['kind']=='output','call'].tolist()==[1]

def test_shared():
    "One module under two parents is hooked once; a weight that two modules share has one row."
    l = nn.Linear(4,4)
    a,b = nn.Sequential(l, nn.ReLU()),nn.Sequential(nn.Tanh(), l)
    df = check(nn.Sequential(a, b, nn.Linear(4,3)), *vectors(), n_rows=3)
    assert df['name'].tolist()==['0.0','0.0','2','0.0.weight','0.0.bias','2.weight','2.bias']
    e,d = nn.Linear(4,4),nn.Linear(4,4, bias=False)
    d.weight = e.weight
    df = check(nn.Sequential(e, nn.ReLU(), d), *vectors(), n_rows=2)
    assert names(df, 'param')=={'0.weight','0.bias'}

def test_identity_modules():
    "Modules that hand on what they got, a parent that returns its child's tensor, in-place changes in between."
    net = nn.Sequential(nn.Linear(4,4), nn.Sequential(nn.Identity(), nn.Linear(4,4), nn.Dropout(.5, inplace=True), nn.ReLU(inplace=True)), nn.Identity(), nn.Linear(4,3))
    check(net, *vectors(), listed=['(model)',*(n for n,_ in net.named_modules() if n)], n_rows=9)
    def f(s, x):
        o = s.l(x)
        o += s.m(x); o.mul_(2); o[:,0] = 1.
        return s.n(o)
    check(Net(f, l=nn.Linear(4,4), m=nn.Linear(4,4), n=nn.Linear(4,3)), *vectors(), n_rows=3)

def test_returns_its_parameter():
    "A leaf as output, and one that is used outside the module as well."
    net = Net(lambda s,x: s.l(x)*s.e(), l=nn.Linear(4,3), e=Fn(lambda w: w, 3))
    check(net, *vectors(), n_rows=2)
    check(net, *vectors(), n_rows=2)

def test_checkpoint():
    from torch.utils.checkpoint import checkpoint
    def net(reentrant):
        torch.manual_seed(0)
        return Net(lambda s,x: s.h(checkpoint(s.b, s.l(x), use_reentrant=reentrant)), l=nn.Linear(4,4), b=nn.Sequential(nn.Linear(4,5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5,4)), h=nn.Linear(4,3))
    x,y = vectors()
    want = output_grads(Net(lambda s,x: s.h(s.b(s.l(x))), **net(False)._modules), lambda m: F.cross_entropy(m(x), y), ['l','b.0','b.1','b.3','h'])
    for reentrant in (True,False):
        cb = GradStatsCallback('output')
        fit(Learner(loaders(x, y), net(reentrant), loss_func=F.cross_entropy, opt_func=SGD, cbs=[cb,TrainOnly()]))
        check_rows(cb.df.assign(call=0), want, ['l','b.0','b.1','b.3','h'])

class Graph(Learner):
    "Gradients that are part of a graph themselves"
    def _backward(self): self.loss_grad.backward(create_graph=True)

@pytest.mark.parametrize('cls', (GradStatsCallback,ByRows))
def test_create_graph(cls):
    x,y = vectors()
    net = nn.Sequential(nn.Linear(4,60), nn.Tanh(), nn.Linear(60,60), nn.Linear(60,3))
    want = output_grads(net, lambda m: F.cross_entropy(m(x), y), owners(net))
    cb,norm,spy = cls(),GradNormCallback(),Spy()
    fit(Graph(loaders(x, y), net, loss_func=F.cross_entropy, opt_func=SGD, cbs=[cb,norm,spy,TrainOnly()]))
    check_rows(cb.df[cb.df['kind']=='output'], want, owners(net))
    check_params(cb.df, spy, norm.norms)

# --- what a gradient may be

@pytest.mark.parametrize('dtype', (torch.float64, torch.float16, torch.bfloat16))
def test_dtypes(dtype):
    net = nn.Sequential(nn.Linear(64,128), nn.ReLU(), nn.Linear(128,40), nn.LayerNorm(40), nn.Linear(40,3)).to(dtype)
    check(net, *vectors(32, 64, dtype), loss=lambda o,y: F.cross_entropy(o.float(), y))
    check(nn.Sequential(nn.Linear(64,40).to(dtype), Net(lambda s,x: x.float()), nn.Linear(40,3)), *vectors(8, 64, dtype))   # two dtypes in one model

def test_channels_last():
    m = tv.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    net = Net(lambda s,x: s.m(x.contiguous(memory_format=torch.channels_last)), m=m)
    grad = []
    m.layer1[0].bn1.register_forward_hook(lambda m,i,o: o.register_hook(grad.append) and None)
    check(net, *pictures())
    assert any(g.is_contiguous(memory_format=torch.channels_last) and not g.is_contiguous() for g in grad)

def test_strange_layouts():
    "Gradients with holes, transposed, expanded, of one element, of no dimension."
    def f(s, x):
        x = s.l(x)
        a,b = s.t(x.t()),s.e(x)[:,::2]
        return a.t().sum(1).mean()+b.square().mean()+s.z(x.mean())*s.o(x[:1,:1]).sum()
    net = Net(f, l=nn.Linear(4,6), t=Fn(lambda w,x: x*w[:,None], 6), e=Fn(lambda w,x: x*w, 6), z=Fn(lambda w,x: x*w.sum(), 1), o=Fn(lambda w,x: x*w, 1))
    df = check(net, *vectors(300), loss=lambda o,y: o, n_rows=5)
    assert df.set_index('name')['numel'][['z','o']].tolist()==[1,1]

@pytest.mark.parametrize('n', (3, 700, 70_000))
def test_stride_0(n):
    "`sum` hands on one number that is seen many times."
    net = Net(lambda s,x: s.h(s.l(x)), l=nn.Linear(2,4), h=Fn(lambda w,x: x*w))
    strides = []
    net.h.register_forward_hook(lambda m,i,o: o.register_hook(lambda g: strides.append(g.stride())) and None)
    df = check(net, *vectors(n, 2), loss=lambda o,y: o.sum())
    assert strides[-1]==(0,0) and df.set_index('name').loc['h',['max_abs','mean','std']].tolist()==[1,1,0]

def test_empty_and_0d_parameters():
    "A parameter of no elements has a row of zeros, one of no dimension is an element."
    def f(s, x): return s.l(x)*s.scale + s.none.sum() + torch.cat([s.e(x),x[:,:3]], 1)
    net = Net(f, l=nn.Linear(4,3), e=nn.Linear(4,0), scale=nn.Parameter(torch.tensor(2.)), none=nn.Parameter(torch.empty(0,5)))
    df = check(net, *vectors())
    n = df[df['kind']=='param'].set_index('name')['numel']
    assert n.to_dict()==dict(scale=1, none=0)|{'l.weight':12, 'l.bias':3, 'e.weight':0, 'e.bias':0}
    assert df.set_index('name').loc['e','numel']==0

def test_empty_batch_part():
    "A module that got no samples this time."
    net = Net(lambda s,x: torch.cat([s.a(x[x[:,0]>100]), s.b(x)]), a=nn.Linear(4,3), b=nn.Linear(4,3))
    assert check(net, *vectors()).set_index('name').loc['a','numel']==0

@pytest.mark.parametrize('seen', ([1,1,5,2], [0,0,0,0], list(range(10))))
def test_sparse_embedding(seen):
    "A sparse gradient is the dense one, with the zeros that are not stored; an index seen twice counts once."
    net = nn.Sequential(nn.Embedding(10,3, sparse=True), nn.Flatten(), nn.Linear(3,4))
    x = torch.tensor(seen)[:,None]
    df = check(net, x, torch.randint(4, (len(x),)), opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
    row = df.set_index('name').loc['0.weight']
    assert row['numel']==30 and row['zeros']==3*(10-len(set(seen)))

def test_complex():
    "Complex weights and outputs: absolute values are moduli, the mean is its real part."
    net = Net(lambda s,x: s.h((s.c(x.to(torch.complex64)*s.w)).abs()), c=nn.Linear(4,4, dtype=torch.complex64), w=nn.Parameter(torch.randn(4, dtype=torch.complex64)), h=nn.Linear(4,3))
    df = check(net, *vectors())
    assert {'w','c.weight'}<=names(df, 'param')

# --- from the smallest to the largest number, and beyond

class Grad(nn.Module):
    "Has exactly this gradient, as output and as parameter"
    def __init__(self, g): super().__init__(); self.register_buffer('g', g); self.w = nn.Parameter(torch.zeros_like(g))
    def forward(self, x): return (self.w+0.)

def of(g):
    "Rows of a model with this gradient, from both engines"
    for cls in (ByRows,GradStatsCallback): res = _of(g, cls())
    return res

def _of(g, cb):
    net = Net(lambda s,x: s.m(x), m=Grad(g))
    loss = lambda o,y: _Inject.apply(o, g)
    norm = GradNormCallback()
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        fit(Learner(loaders(torch.zeros(2,1), torch.zeros(2)), net, loss_func=loss, opt_func=SGD, lr=0., cbs=[cb,norm,TrainOnly()]))
    df = cb.df
    assert df['name'].tolist()==['m','m.w']
    for r in df.to_dict('records'): compare(r, g.double().numpy())
    return df,norm

class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g): ctx.save_for_backward(g); return x.detach().sum().float()
    @staticmethod
    def backward(ctx, go): return ctx.saved_tensors[0].clone(),None

@pytest.mark.parametrize('n', (1, 7, 1000, 5000, 300_000))
@pytest.mark.parametrize('e', (-44, -38, -30, -20, -8, 0, 8, 18, 30, 38))
def test_magnitudes(e, n):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=g).clamp(-3,3)*.9
    df,norm = of((x.double()*10.**e).float())
    np.testing.assert_allclose(norm.norms[0], float((x.double()*10.**e).float().double().norm()), rtol=1e-5)

@pytest.mark.parametrize('n', (5, 3000, 300_000))
@pytest.mark.parametrize('kind', ('spike','wide','shifted','sparse','negative','signs','edge','subnormal'))
def test_shapes_of_distributions(kind, n):
    "One huge element, 76 decades at once, a mean far from 0, nearly all zeros, elements on the threshold."
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=g)
    x = dict(spike=lambda: x.mul(1e-6).index_fill(0, torch.tensor([n//2]), 1e30), wide=lambda: torch.sign(x)*10**(torch.rand(n, generator=g).double()*76-38), shifted=lambda: 1000+x*1e-2,
             sparse=lambda: x*(torch.arange(n)%997==3), negative=lambda: -x.abs(), signs=lambda: x.sign(), edge=lambda: torch.tensor([1., 1.0000001, .99999994, -1., -1.0000001]).repeat(n//5),
             subnormal=lambda: x*1e-40)[kind]()
    of(x.float())

@pytest.mark.parametrize('n', (4, 3000, 300_000))
@pytest.mark.parametrize('bad', ([torch.nan], [torch.inf], [-torch.inf], [torch.inf,-torch.inf], [torch.nan,torch.inf], [3e38]*3))
@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
def test_not_finite(bad, n, dtype):
    "Nothing is dropped: counted, and NaN or inf as IEEE gives. Numbers near the largest of float32 are finite."
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    x[-len(bad):] = torch.tensor(bad, dtype=dtype)
    of(x)

@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16, torch.float64))
@pytest.mark.parametrize('n', (7, 5000, 300_000))
def test_extremes_of_dtypes(dtype, n):
    i = torch.finfo(dtype)
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).to(dtype)
    big,tiny = (min(i.max, 1e30),max(i.tiny, 1e-30))
    for v in (big,tiny): of(torch.cat([x, torch.tensor([v,-v], dtype=dtype)]))
    of(torch.cat([x, torch.tensor([torch.inf], dtype=dtype)]))
