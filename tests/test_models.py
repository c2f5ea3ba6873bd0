"Every output and parameter gradient of many architectures, each equal to autograd's."
from collections import OrderedDict
import pytest,torch,torchvision.models as tv
import torch.nn.functional as F
from fastai.basics import *
from torch import nn
from fastai_gradstats import GradStatsCallback
from helpers.callbacks import ByRows,TrainOnly
from helpers.models import DataPair,FunctionNet,FunctionWithWeight,NamedPair,convnext,random_pictures,random_vectors,swin,tensor_leaves,vit
from helpers.oracles import check_batch,check_rows,names_of_kind,output_grads,owner_names
from helpers.training import fit,loaders

# --- torchvision

def aux_loss(o, y): return sum(F.cross_entropy(t, y)*w for t,w in zip([o] if isinstance(o, Tensor) else o.values() if isinstance(o, dict) else o, (1,.4,.3)))
def pixel_loss(o, y): return aux_loss({k:t.mean((2,3)) for k,t in o.items()}, y)

small_models = dict(
    resnet18=tv.resnet18,
    densenet121=tv.densenet121,
    mobilenet_v3_small=tv.mobilenet_v3_small,
    efficientnet_b0=tv.efficientnet_b0,
    shufflenet=tv.shufflenet_v2_x0_5,
    squeezenet=tv.squeezenet1_1)
small_models = {k:partial(f, num_classes=10) for k,f in small_models.items()} | dict(vit=vit, swin=swin, convnext=convnext)

def randomise(model):
    "No weight that is zero at first (ViT's head, say) hides a gradient"
    torch.manual_seed(0)
    for p in model.parameters():
        with torch.no_grad(): p.add_(torch.randn_like(p)*.02)
    return model

slow_models = 'vgg11_bn','inception_v3','fcn'
def each_model(names): return pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n in slow_models else n for n in names])

@each_model(small_models)
def test_torchvision(name): check_batch(randomise(small_models[name]()), *random_pictures(size=64 if name=='squeezenet' else 32))

models_with_aux = dict(googlenet=(partial(tv.googlenet, num_classes=10, aux_logits=True, init_weights=False), 64, aux_loss),
           lraspp=(partial(tv.segmentation.lraspp_mobilenet_v3_large, weights_backbone=None, num_classes=10), 64, pixel_loss),
           fcn=(partial(tv.segmentation.fcn_resnet50, weights_backbone=None, num_classes=10, aux_loss=True), 32, pixel_loss),
           vgg11_bn=(partial(tv.vgg11_bn, num_classes=10, init_weights=False), 32, F.cross_entropy),
           inception_v3=(partial(tv.inception_v3, num_classes=10, aux_logits=True, init_weights=False), 299, aux_loss))

@each_model(models_with_aux)
def test_several_outputs(name):
    "Auxiliary heads and dicts: each tensor of the root's output too."
    f,size,loss = models_with_aux[name]
    model,(x,y) = f(),random_pictures(2, size)
    if name=='inception_v3':
        model,x,loss = model.double(),x.double(),lambda o,y: aux_loss(o, y).float()   # 94 convolutions in float32 leave 1e-5 between any two routes
    df = check_batch(model, x, y, loss)
    if name=='vgg11_bn': return
    outs = dict(googlenet=3, lraspp=1, fcn=2, inception_v3=2)[name]
    check_batch(model, x, y, loss, listed=['(model)'], n_rows=outs)
    assert any('aux' in n.lower() for n in names_of_kind(df, 'output'))==(outs>1)

def test_engine_of_a_gpu(monkeypatch):
    monkeypatch.setitem(globals(), 'GradStatsCallback', ByRows)
    check_batch(small_models['resnet18'](), *random_pictures())
    check_batch(randomise(small_models['swin']()), *random_pictures())

def test_attention_projections():
    "Attention calls functions with its projections' weights: those modules never run and have parameter rows only."
    for model,ps in (vit(),['out_proj']),(swin(),['qkv','proj']):
        df = check_batch(randomise(model), *random_pictures())
        out,par = names_of_kind(df, 'output'),names_of_kind(df, 'param')
        quiet = [n for n,m in model.named_modules() if n.split('.')[-1] in ps and 'features.0' not in n]
        assert len(quiet)>=2 and not out & set(quiet) and {f'{n}.weight' for n in quiet}<=par
        assert {n for n in owner_names(model) if n not in quiet}==out

def test_relu_used_twice():
    "torchvision's BasicBlock uses one in-place ReLU twice: two rows, in the order of forward."
    m = tv.resnet18(num_classes=10)
    df = check_batch(m, *random_pictures(), listed=[n for n,o in m.named_modules() if isinstance(o, nn.ReLU)], n_rows=17)
    assert df.loc[df['name']=='layer1.0.relu','call'].tolist()==[0,1]

@each_model(('resnet18','densenet121','mobilenet_v3_small'))
def test_every_module(name):
    "Each module listed: blocks, in-place activations, pools, the root."
    m = small_models[name]()
    check_batch(m, *random_pictures(2), listed=[n or '(model)' for n,_ in m.named_modules()])

def mean_square(o, y): return (o*o).mean()
def weighted_squares(o, y=None): return sum((i+1)*(t*t).sum() for i,t in enumerate(tensor_leaves(o)))

nested_outputs = dict(
    tuple=lambda a,b: (a,b),
    list=lambda a,b: [a,b],
    dict=lambda a,b: dict(x=a, y=b),
    ordered=lambda a,b: OrderedDict({'y.1':a, 'x':b}),
    namedtuple=NamedPair,
    dataclass=DataPair,
    deep=lambda a,b: (a, dict(k=[b, 3, None], j=DataPair(a*b)), ('s', NamedPair(a+b, a.detach()))),
    same=lambda a,b: (a,a),
    ints=lambda a,b: (a.argmax(1), a, b),
    one=lambda a,b: (a,),
    empty=lambda a,b: (a, (), {}, [b]))

@pytest.mark.parametrize('nest', nested_outputs)
def test_nested(nest):
    "`out` is the tensor's place among the leaves, whatever they are."
    f = nested_outputs[nest]
    net = FunctionNet(lambda s,x: s.m(s.l(x)), l=nn.Linear(4,4), m=FunctionWithWeight(lambda w,x: f(x*w, x.tanh()+w)))
    diff = lambda o,y: sum((i+1)*(t*t).sum() for i,t in enumerate(tensor_leaves(o)) if t.requires_grad)
    df = check_batch(net, *random_vectors(), loss=diff)
    outs = df.loc[(df['name']=='m'),'out'].tolist()
    assert outs==dict(deep=[0,1,4,7], ints=[1,2], one=[0]).get(nest, [0,1])

@pytest.mark.parametrize('rnn', (nn.LSTM, nn.GRU, nn.RNN))
@pytest.mark.parametrize('use', ('output','state','all'))
def test_rnn(rnn, use):
    "A state that is not used has no row."
    def f(s, x):
        o,h = s.r(s.l(x))
        return dict(output=[o], state=[h], all=[o,h])[use]
    net = FunctionNet(f, l=nn.Linear(4,3), r=rnn(3,5, num_layers=2, dropout=.3, batch_first=True))
    torch.manual_seed(0)
    df = check_batch(net, torch.randn(3,7,4), torch.zeros(3), loss=weighted_squares)
    n = 3 if rnn is nn.LSTM else 2
    assert df.loc[df['name']=='r','out'].tolist()==dict(output=[0], state=list(range(1,n)), all=list(range(n)))[use]

def test_packed_sequence():
    "A `PackedSequence` is a tuple whose second tensor has no gradient."
    def f(s, x):
        p,_ = s.r(nn.utils.rnn.pack_padded_sequence(x, [5,3,2], batch_first=True))
        return s.l(p.data)
    torch.manual_seed(0)
    check_batch(FunctionNet(f, l=nn.Linear(3,2), r=nn.LSTM(4,3)), torch.randn(3,5,4), torch.zeros(3), loss=mean_square, n_rows=2)

split_views = dict(
    chunk=lambda x: x.chunk(2, 1),
    unbind=lambda x: x.unbind(1),
    split=lambda x: x.split([1,3], 1),
    max=lambda x: x.max(1),
    svd=lambda x: torch.linalg.svd(x, full_matrices=False),
    var_mean=lambda x: torch.var_mean(x, 1))

@pytest.mark.parametrize('split', split_views)
def test_views(split):
    "Several views of one tensor, and torch's own named tuples."
    net = FunctionNet(lambda s,x: s.m(s.l(x)), l=nn.Linear(4,4), m=FunctionWithWeight(lambda w,x: split_views[split](x*w)))
    n = dict(unbind=4, svd=3, max=1).get(split, 2)
    check_batch(net, *random_vectors(), loss=lambda o,y: sum(t.abs().sum()*(i+1) for i,t in enumerate(o) if t.requires_grad), n_rows=1+n)

@pytest.mark.parametrize('split', split_views)
def test_views_of_which_one_is_used(split):
    "The others have no gradient (autograd calls their hooks with None) and no row."
    net = FunctionNet(lambda s,x: s.m(s.l(x)), l=nn.Linear(4,4), m=FunctionWithWeight(lambda w,x: split_views[split](x*w)))
    check_batch(net, *random_vectors(), loss=lambda o,y: o[0].abs().sum(), n_rows=2)

@pytest.mark.parametrize('k', (1,2,5))
def test_called_k_times(k):
    "`call` counts in the order of forward; what is done to one call does not touch another."
    def f(s, x):
        for i in range(k): x = F.relu(s.l(x), inplace=True)*(i+1)
        return s.h(x)
    df = check_batch(FunctionNet(f, l=nn.Linear(4,4), h=nn.Linear(4,3)), *random_vectors(), n_rows=k+1)
    assert df.loc[df['name']=='l','call'].tolist()==list(range(k))

def test_calls_without_gradient():
    "A call under `no_grad`, and one whose output the loss does not need: no row. The second is counted, since it might have had one."
    def f(s, x):
        with torch.no_grad(): z = s.l(x)
        s.l(x+z)
        return s.l(x*z)
    df = check_batch(FunctionNet(f, l=nn.Linear(4,4)), *random_vectors(), n_rows=1)
    assert df.loc[df['kind']=='output','call'].tolist()==[1]

def test_shared():
    "One module under two parents is hooked once; a weight that two modules share has one row."
    l = nn.Linear(4,4)
    a,b = nn.Sequential(l, nn.ReLU()),nn.Sequential(nn.Tanh(), l)
    df = check_batch(nn.Sequential(a, b, nn.Linear(4,3)), *random_vectors(), n_rows=3)
    assert df['name'].tolist()==['0.0','0.0','2','0.0.weight','0.0.bias','2.weight','2.bias']
    e,d = nn.Linear(4,4),nn.Linear(4,4, bias=False)
    d.weight = e.weight
    df = check_batch(nn.Sequential(e, nn.ReLU(), d), *random_vectors(), n_rows=2)
    assert names_of_kind(df, 'param')=={'0.weight','0.bias'}

def test_identity_modules():
    "Modules that hand on what they got, a parent that returns its child's tensor, in-place changes in between."
    net = nn.Sequential(nn.Linear(4,4),
                        nn.Sequential(nn.Identity(), nn.Linear(4,4), nn.Dropout(.5, inplace=True), nn.ReLU(inplace=True)),
                        nn.Identity(), nn.Linear(4,3))
    check_batch(net, *random_vectors(), listed=['(model)',*(n for n,_ in net.named_modules() if n)], n_rows=9)
    def f(s, x):
        o = s.l(x)
        o += s.m(x); o.mul_(2); o[:,0] = 1.
        return s.n(o)
    check_batch(FunctionNet(f, l=nn.Linear(4,4), m=nn.Linear(4,4), n=nn.Linear(4,3)), *random_vectors(), n_rows=3)

def test_returns_its_parameter():
    "A leaf as output, and one that is used outside the module as well."
    net = FunctionNet(lambda s,x: s.l(x)*s.e(), l=nn.Linear(4,3), e=FunctionWithWeight(lambda w: w, 3))
    check_batch(net, *random_vectors(), n_rows=2)
    check_batch(net, *random_vectors(), n_rows=2)

def test_checkpoint():
    from torch.utils.checkpoint import checkpoint
    def net(reentrant):
        torch.manual_seed(0)
        return FunctionNet(lambda s,x: s.h(checkpoint(s.b, s.l(x), use_reentrant=reentrant)), l=nn.Linear(4,4),
                           b=nn.Sequential(nn.Linear(4,5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5,4)),
                           h=nn.Linear(4,3))
    x,y = random_vectors()
    want = output_grads(FunctionNet(lambda s,x: s.h(s.b(s.l(x))), **net(False)._modules), lambda m: F.cross_entropy(m(x), y), ['l','b.0','b.1','b.3','h'])
    for reentrant in (True,False):
        cb = GradStatsCallback('output')
        fit(Learner(loaders(x, y), net(reentrant), loss_func=F.cross_entropy, opt_func=SGD, cbs=[cb,TrainOnly()]))
        check_rows(cb.df.assign(call=0), want, ['l','b.0','b.1','b.3','h'])
