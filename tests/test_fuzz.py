"""Whatever trains without the callbacks trains with them, bit for bit; whatever raises without them raises the same.

A seed draws a case: a model of odd layers, what it returns, targets, a loss, an optimizer, a training loop, callbacks that do
something at some event, what the user calls on the Learner, and how our callbacks are set up. The case runs twice, without and
with ours, and everything that training leaves behind is compared after each call. Where nobody touches gradients, what was
recorded is compared with what the optimizer got.

    pytest -m slow tests/test_fuzz.py                                # 500 seeds, about a minute
    pytest -m slow "tests/test_fuzz.py::test_same_training[17]"      # one of them
    GRADSTATS_FUZZ=500:3000 pytest -m slow tests/test_fuzz.py        # others
    python tests/test_fuzz.py 17                                     # the smallest case that still fails as 17 does

To add an ingredient, write one small function and put it in its table with `@into(...)`.
"""
import hashlib,io,os,pickle,random,re,sys,threading,warnings
from collections import Counter,OrderedDict,UserDict,namedtuple
from contextlib import contextmanager,nullcontext,redirect_stdout
from copy import deepcopy
from dataclasses import dataclass,field,replace
from functools import partial
from tempfile import TemporaryDirectory
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import unserializable_hook
from fastai.basics import (Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException,
    CancelStepException, CancelTrainException, CancelValidException, DataLoaders, L, Learner, OptimWrapper, TensorBase,
    TrainEvalCallback, params, set_seed)
from fastai.callback.mixup import MixUp
import fastai.callback.schedule   # gives Learner `fit_one_cycle`, `fine_tune` and `lr_find`
from fastai.callback.tracker import EarlyStoppingCallback,SaveModelCallback,TerminateOnNaNCallback
from fastai.callback.training import BnFreeze,GradientAccumulation,GradientClip,ShortEpochCallback
from fastai.optimizer import Adam,SGD,ranger
from fastai_gradstats import GradNormCallback,GradStatsCallback
from helpers.callbacks import CPUAmp

WIDTH,CLASSES,BATCH = 6,3,4
events = ('before_fit before_epoch before_train before_batch after_pred after_loss before_backward after_cancel_backward after_backward '
          'before_step after_cancel_step after_step after_cancel_batch after_batch after_cancel_train after_train before_validate '
          'after_cancel_validate after_validate after_cancel_epoch after_epoch after_cancel_fit after_fit').split()
batch_events = 'before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch'.split()
orders = [-100, -9, 0, 5, 9.5, 10, 10.4, 10.5, 10.55, 10.6, 10.65, 11, 12, 60, 999, 1000, 1001, 2000]

def into(table):
    "Put a function or class in `table`, under its name"
    def put(f):
        table[f.__name__] = f
        return f
    return put

# --- containers: what a module may return. Each is a pair: wrap a tensor, and find it again

containers = {}

def container(unwrap):
    def put(wrap):
        containers[wrap.__name__] = wrap,unwrap
        return wrap
    return put

def itself(o): return o
def first(o): return o[0]
def last(o): return o[-1]
def at_h(o): return o['h']
def dot_h(o): return o.h

@container(itself)
def tensor(h): return h

@container(first)
def pair(h): return h,h*2

@container(first)
def with_none_and_int(h): return h,None,3,'text',2.5

@container(last)
def nested(o): return [(o.detach(), [o*2, ()]), {}, o]

@container(at_h)
def dict_(h): return dict(n=1, none=None, h=h)

@container(at_h)
def user_dict(h): return UserDict(h=h)

@container(at_h)
def ordered(h): return OrderedDict(h=h, twice=h)

@container(at_h)
def cyclic_dict(h):
    res = dict(h=h)
    res['me'] = res
    return res

@container(first)
def cyclic_list(h):
    res = [h]
    res.append(res)
    return res

Point = namedtuple('Point', 'h other')

@container(dot_h)
def named_tuple(h): return Point(h, None)

@dataclass
class Fields:
    h:object
    loss:object = field(init=False)   # set later, if at all

@container(dot_h)
def half_set_dataclass(h): return Fields(h)

@container(dot_h)
def custom_object(h):
    res = threading.local()
    res.h = h
    return res

class RaisingDict(dict):
    "A dict whose `values` is not to be called"
    def values(self): raise NotImplementedError('values')

@container(at_h)
def raising_dict(h): return RaisingDict(h=h)

class DrawingDict(dict):
    "A dict whose values are made when somebody asks for them, with random numbers"
    def values(self): return [torch.rand(1), *super().values()]

@container(at_h)
def drawing_dict(h): return DrawingDict(h=h)

class RaisingList(list):
    "A list that can be indexed, not iterated"
    def __iter__(self): raise NotImplementedError('iter')

@container(first)
def raising_list(h): return RaisingList([h])

@container(first)
def linked_list(h):
    "Nested deeper than Python's stack"
    res = ()
    for _ in range(3000): res = (None, res)
    return h,res

def only(o): return next(o)

@container(only)
def generator(h): return (x for x in (h, h*2))

@container(itself)
def view(h): return h.view(-1, 2, 3).view(-1, WIDTH)

def joined(o): return torch.cat(o, 1)

@container(joined)
def chunks(h): return h.chunk(2, 1)

@container(itself)
def expanded(h): return h[None].expand(2, *h.shape)[1]

def real(o): return torch.view_as_real(o).sum(-1)

@container(real)
def complex_(h): return torch.complex(h, h.detach())

def single(o): return o.to(torch.float32)

@container(single)
def float64(h): return h.double()

@container(single)
def bfloat16(h): return h.bfloat16()

@container(itself)
def subclass(h): return TensorBase(h)

def dense(o): return o.to_dense()

@container(dense)
def sparse(h): return h.to_sparse()

@container(dense)
def sparse_csr(h): return h.to_sparse_csr()

def stacked(o): return torch.stack(o.unbind())

@container(stacked)
def nested_tensor(h): return torch.nested.as_nested_tensor(list(h.unbind()))

@container(first)
def beside_empty(h): return h,h[:0],h.sum()

@container(first)
def beside_integers(h): return h,h.argmax(1),torch.ones(2, requires_grad=True)

class Keep:
    "A tensor kept aside, while None is returned"

def kept(o): return Keep.h

@container(kept)
def none(h):
    Keep.h = h
    return None

# --- layers: modules from (n, WIDTH) to (n, WIDTH)

layers = {}

class Wrap(nn.Module):
    "Owns a parameter and returns a container"
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.w = nn.Parameter(torch.linspace(.5, 1.5, WIDTH))
    def forward(self, x): return containers[self.kind][0](x*self.w)

class Unwrap(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner = Wrap(kind)
    def forward(self, x): return containers[self.inner.kind][1](self.inner(x))

class Counting(nn.Module):
    "A linear layer that knows how often it was called in training"
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)
        self.n = 0
    def forward(self, x):
        if self.training: self.n += 1
        return self.act(self.l(x))
    def act(self, x): return x

@into(layers)
def linear(): return nn.Linear(WIDTH, WIDTH)

@into(layers)
def batchnorm(): return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH))

@into(layers)
def relu_in_place(): return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))

@into(layers)
def dropout(): return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(.3))

@into(layers)
class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv1d(1, 2, 3, padding=1)
    def forward(self, x): return self.c(x[:,None]).mean(1)

@into(layers)
class Recurrent(nn.Module):
    def __init__(self, cls=nn.LSTM):
        super().__init__()
        self.r = cls(1, 2, batch_first=True)
    def forward(self, x): return self.r(x[:,:,None])[0].sum(-1)

@into(layers)
def gru(): return Recurrent(nn.GRU)

@into(layers)
class Packed(nn.Module):
    "A recurrent layer on a packed sequence"
    def __init__(self):
        super().__init__()
        self.r = nn.GRU(1, 1, batch_first=True)
    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x[:,:,None], torch.full((len(x),), WIDTH), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.r(packed)[0], batch_first=True)[0][...,0]

@into(layers)
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.MultiheadAttention(2, 1, batch_first=True)
    def forward(self, x):
        x = x.view(-1, 3, 2)
        return self.a(x, x, x)[0].reshape(-1, WIDTH)

@into(layers)
class Embedded(nn.Module):
    "The sign of the input looks up a row"
    def __init__(self, sparse=False):
        super().__init__()
        self.e = nn.Embedding(2, 1, sparse=sparse)
    def forward(self, x): return x+self.e((x>0).long())[...,0]

@into(layers)
def sparse_embedding(): return Embedded(sparse=True)

@into(layers)
def weight_norm(): return nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

@into(layers)
def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))

@into(layers)
def spectral_norm(): return nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

@into(layers)
def lazy(): return nn.LazyLinear(WIDTH)

@into(layers)
def lazy_batchnorm(): return nn.Sequential(nn.LazyLinear(WIDTH), nn.LazyBatchNorm1d())

@into(layers)
class LazyNeverCalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.never = nn.LazyLinear(4)
    def forward(self, x): return x

@into(layers)
class NeverCalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.never = nn.Linear(2, 2)
    def forward(self, x): return x

@into(layers)
class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)
    def forward(self, x): return self.l(self.l(x).relu_())

@into(layers)
class Shared(nn.Module):
    "One module and one weight in two places"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(WIDTH, WIDTH),nn.Linear(WIDTH, WIDTH)
        self.c = self.a
        self.b.weight = self.a.weight
    def forward(self, x): return self.c(self.b(self.a(x)))

@into(layers)
def frozen():
    res = nn.Linear(WIDTH, WIDTH)
    return res.requires_grad_(False)

@into(layers)
def scripted(): return torch.jit.script(nn.Linear(WIDTH, WIDTH))

@into(layers)
def traced(): return torch.jit.trace(nn.Linear(WIDTH, WIDTH), torch.randn(BATCH, WIDTH))

@into(layers)
class ChangesClass(Counting):
    "Becomes another class at its second call"
    def act(self, x):
        if self.n==2: self.__class__ = Counting
        return x

@into(layers)
class RaisesInForward(Counting):
    def act(self, x):
        if self.n==3: raise ArithmeticError('third call')
        return x

@into(layers)
class InterruptsInForward(Counting):
    def act(self, x):
        if self.n==3: raise KeyboardInterrupt
        return x

@into(layers)
class RaisesInBackward(Counting):
    def act(self, x):
        if self.n==3 and x.requires_grad: x.register_hook(self.fail)
        return x
    def fail(self, g): raise ArithmeticError('backward')

@into(layers)
class AddsHooks(Counting):
    "Gives itself a hook of each kind"
    def act(self, x):
        if self.n==2:
            self.l.register_forward_hook(double_output)
            self.l.register_forward_pre_hook(see)
            self.l.register_full_backward_hook(see)
        return x

@into(layers)
class ClearsHooks(Counting):
    "Takes every forward hook off its child"
    def act(self, x):
        if self.n==2: self.l._forward_hooks.clear()
        return x

def double_output(module, inputs, output): return output*2
def see(*args): pass

@into(layers)
class Detaches(Counting):
    def act(self, x): return x.detach()+x.new_zeros(()).requires_grad_() if self.n%2 else x

@into(layers)
class GrowsAndSwaps(Counting):
    "A new submodule, then another parameter in the place of the old"
    def act(self, x):
        if self.n==2: self.adapter = nn.Linear(WIDTH, WIDTH)
        if self.n==3: self.l.weight = nn.Parameter(self.l.weight.detach().clone())
        if self.n==4: del self.adapter
        return self.adapter(x) if hasattr(self, 'adapter') else x

@into(layers)
class ForwardOnInstance(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.forward = partial(F.linear, weight=self.weight.detach()*1.)

@into(layers)
class ReturnsItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
    def forward(self, x): return x

@into(layers)
class AddsLeaf(nn.Module):
    "Its child returns the parameter itself"
    def __init__(self):
        super().__init__()
        self.leaf = Leaf()
    def forward(self, x): return x+self.leaf()

class Leaf(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(WIDTH))
    def forward(self): return self.w

@into(layers)
class Checkpointed(nn.Module):
    def __init__(self, reentrant=False):
        super().__init__()
        self.l,self.reentrant = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(.2)),reentrant
    def forward(self, x): return checkpoint(self.l, x, use_reentrant=self.reentrant)

@into(layers)
class InThread(nn.Module):
    "Calls its child in another thread"
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)
    def forward(self, x):
        res = []
        def work(enabled):
            with torch.set_grad_enabled(enabled): res.append(self.l(x))
        t = threading.Thread(target=work, args=(torch.is_grad_enabled(),))
        t.start()
        t.join()
        return res[0]

@into(layers)
class BackwardInForward(nn.Module):
    "A loss of its own, differentiated on the spot"
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)
    def forward(self, x):
        if torch.is_grad_enabled(): self.l(x.detach()).square().mean().backward()
        return self.l(x)

@into(layers)
class GradInForward(nn.Module):
    "The gradient of an energy is the output"
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)
    def forward(self, x):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            return torch.autograd.grad(self.l(z).square().sum(), z, create_graph=True)[0]

@into(layers)
class Mapped(nn.Module):
    "Runs its child inside `torch.func.vmap`"
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)
    def forward(self, x): return torch.func.vmap(self.l)(x)

@into(layers)
class Functional(nn.Module):
    "Its child is called with other parameters"
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)
    def forward(self, x):
        ps = {n:p*2 for n,p in self.l.named_parameters()}
        return torch.func.functional_call(self.l, ps, (x,))

@into(layers)
class ViewChangedInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Wrap('view')
    def forward(self, x): return self.inner(x).mul_(2)

@into(layers)
class OddParameters(nn.Module):
    "None, no element, 0-d, integers, lists, dicts, another device, other dtypes, names"
    def __init__(self):
        super().__init__()
        self.register_parameter('none', None)
        self.empty,self.scalar = nn.Parameter(torch.empty(0, 3)),nn.Parameter(torch.tensor(2.))
        self.whole = nn.Parameter(torch.arange(3), requires_grad=False)
        self.listed = nn.ParameterList([torch.ones(WIDTH), torch.zeros(1)])
        self.named = nn.ParameterDict({'$a$ <b>':torch.ones(1)})
        self.double_ = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.half_ = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        self.z = nn.Parameter(torch.ones(1, dtype=torch.complex64))
    def forward(self, x):
        x = x*self.scalar*self.listed[0]+self.empty.sum()+self.named['$a$ <b>']
        return x*self.double_.float()*self.half_.float()*self.z.real

@into(layers)
class MetaParameter(nn.Module):
    "A parameter without memory that nobody uses"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.empty(3, device='meta'))
    def forward(self, x): return x

@into(layers)
class Falsy(nn.Module):
    "A module that is False, with length 0"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(WIDTH))
    def __len__(self): return 0
    def forward(self, x): return x*self.w

@into(layers)
class OwnCall(nn.Module):
    "Does not go through `nn.Module.__call__`"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(WIDTH))
    def __call__(self, x): return x*self.w

@into(layers)
class Keywords(nn.Module):
    "Its child takes keywords only"
    def __init__(self):
        super().__init__()
        self.child = KeywordOnly()
    def forward(self, x): return self.child(x=x)

class KeywordOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(WIDTH))
    def forward(self, *, x): return x*self.w

class TwiceFunction(torch.autograd.Function):
    "Two outputs, one of which cannot be differentiated; gradients are views of one another"
    @staticmethod
    def forward(ctx, x):
        index = x.argmax(1)
        ctx.mark_non_differentiable(index)
        return x*2,index
    @staticmethod
    def backward(ctx, g, _): return g.t().t()+g

@into(layers)
class CustomFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(WIDTH))
        self.inner = ReturnsFunction()
    def forward(self, x): return self.inner(x*self.w)[0]

class ReturnsFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(1))
    def forward(self, x): return TwiceFunction.apply(x)

@into(layers)
class SavedOnDisk(nn.Module):
    "Hooks on saved tensors"
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)
    def forward(self, x):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, itself): return self.l(x)

@into(layers)
class InferenceInside(nn.Module):
    "A child that runs in inference mode"
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)
    def forward(self, x):
        with torch.inference_mode(): scale = self.l(x).abs().mean()
        return x*float(scale)

@into(layers)
class NamedLikeOurs(nn.Module):
    def __init__(self):
        super().__init__()
        self.name = self.order = self.hooks = self.grad = None
        self.live,self.kind,self.record = nn.Linear(WIDTH, WIDTH),'param',nn.Identity()
    def forward(self, x): return self.record(self.live(x))

def make_layer(name): return Unwrap(name[3:]) if name.startswith('of_') else layers[name]()

class Net(nn.Module):
    "Layers one after another, a head, and a container around what the head says"
    def __init__(self, names, output, world):
        super().__init__()
        self.layers = nn.Sequential(*(make_layer(n) for n in names))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.output,self.world = output,world
    def forward(self, x, *others):
        x = x.to(self.head.weight.dtype)
        for l in self.layers: x = l(x)
        x = self.head(x.to(self.head.weight.dtype))
        if x.requires_grad: x.register_hook(unserializable_hook(partial(World.head_gradient, self.world)))
        return containers[self.output][0](x)

class FalsyNet(Net):
    def __len__(self): return 0

class NetNamedLikeOurs(Net):
    "What a callback lacks, fastai looks for in the model"
    scaler = lr_finder = kind = every = record = folder = show = keep = 'of the model'
    def after_cancel_batch(self): self.world.calls['model.after_cancel_batch'] += 1
    def before_validate(self): self.world.calls['model.before_validate'] += 1

nets = dict(Net=Net, FalsyNet=FalsyNet, NetNamedLikeOurs=NetNamedLikeOurs)

# --- targets, given the classes

targets = {}

@into(targets)
def classes(y): return y,

@into(targets)
def in_a_dict(y): return dict(y=y),

@into(targets)
def in_a_tuple(y): return (y, 'text', None),

@into(targets)
def empty_list(y): return [],

@into(targets)
def empty_dict(y): return {},

@into(targets)
def strings(y): return ['a']*len(y),

@into(targets)
def number(y): return 1.5,

@into(targets)
def zero_dim(y): return y.sum(),

@into(targets)
def two(y): return y,y.float()

@into(targets)
def no_target(y): return ()

def classes_of(pred, ys):
    "The classes that a target holds, or some"
    y = ys[0] if ys else None
    if isinstance(y, dict): y = y.get('y')
    if isinstance(y, tuple): y = y[0]
    if isinstance(y, torch.Tensor) and y.shape==(len(pred),): return y.long()
    return torch.zeros(len(pred), dtype=torch.long)

# --- losses, given logits and classes

losses = {}

@into(losses)
def mean_loss(o, y): return F.cross_entropy(o, y)

@into(losses)
def sum_loss(o, y): return F.cross_entropy(o, y, reduction='sum')

@into(losses)
def per_sample(o, y): return F.cross_entropy(o, y, reduction='none')

@into(losses)
def one_element(o, y): return F.cross_entropy(o, y)[None]

@into(losses)
def float64_loss(o, y): return F.cross_entropy(o.double(), y)

@into(losses)
def bf16_loss(o, y): return F.cross_entropy(o, y).bfloat16()

@into(losses)
def subclass_loss(o, y): return TensorBase(F.cross_entropy(o, y))

@into(losses)
def tuple_loss(o, y): return LossTuple((F.cross_entropy(o, y), 'parts'))

class LossTuple(tuple):
    def clone(self): return LossTuple(self)
    def mean(self): return self[0].mean()

@into(losses)
def constant(o, y): return torch.tensor(1.)

@into(losses)
def constant_leaf(o, y): return torch.tensor(1., requires_grad=True)

@into(losses)
def nan_sometimes(o, y): return F.cross_entropy(o, y)*(float('nan') if int(y.sum())%3==0 else 1.)

@into(losses)
def zero(o, y): return o.sum()*0

@into(losses)
def infinite(o, y): return (o*1e30).square().sum()

@into(losses)
def empty_batch(o, y): return F.cross_entropy(o[:0], y[:0], reduction='none').sum()

class Loss:
    "A loss function by name, of whatever the model returns"
    y_int = True   # for MixUp
    def __init__(self, case): self.f,self.unwrap = losses[case.loss],containers[case.output][1]
    def __call__(self, pred, *ys, **kwargs):
        o = self.unwrap(pred)
        return self.f(o, classes_of(o, ys))

# --- optimizers, given parameter lists

optimizers = {}

@into(optimizers)
def sgd(ps, lr): return SGD(ps, lr=lr, mom=.9)

@into(optimizers)
def adam(ps, lr): return Adam(ps, lr=lr, wd=.1)

@into(optimizers)
def sgd_l2(ps, lr): return SGD(ps, lr=lr, wd=.1, decouple_wd=False)

@into(optimizers)
def ranger_(ps, lr): return ranger(ps, lr=lr)

@into(optimizers)
def torch_sgd(ps, lr): return OptimWrapper(ps, torch.optim.SGD, lr=lr)

@into(optimizers)
def torch_adamw(ps, lr): return OptimWrapper(ps, torch.optim.AdamW, lr=lr)

@into(optimizers)
def torch_adam_foreach(ps, lr): return OptimWrapper(ps, partial(torch.optim.Adam, foreach=True), lr=lr)

@into(optimizers)
def lbfgs(ps, lr): return OptimWrapper([[p for group in ps for p in group]], torch.optim.LBFGS, lr=lr)

class RaisingSGD(torch.optim.SGD):
    "Fails at its third step"
    n = 0
    def step(self, closure=None):
        self.n += 1
        if self.n==3: raise ArithmeticError('step')
        return super().step(closure)

@into(optimizers)
def raising(ps, lr): return OptimWrapper(ps, RaisingSGD, lr=lr)

class ZeroingSGD(torch.optim.SGD):
    "Gradients are gone after a step"
    def step(self, closure=None):
        super().step(closure)
        self.zero_grad()

@into(optimizers)
def zeroing(ps, lr): return OptimWrapper(ps, ZeroingSGD, lr=lr)

class Duck:
    "What fastai's loop needs of an optimizer, and no more"
    def __init__(self, ps, lr): self.ps,self.lr = list(ps),lr
    def set_hypers(self, **kwargs): self.lr = kwargs.get('lr', self.lr)
    def zero_grad(self):
        for p in self.ps: p.grad = None
    @torch.no_grad()
    def step(self):
        for p in self.ps:
            if p.grad is not None: p.sub_(p.grad.to_dense()*.01 if p.grad.layout!=torch.strided else p.grad*.01)
    def state_dict(self): return dict(lr=self.lr)

# --- training loops

loops = {}

@into(loops)
class Plain(Learner):
    "fastai's loop, noting what the optimizer gets"
    def _step(self):
        gets = self.world.norms_of(self)
        super()._step()
        if not self.world.finding: self.world.got.append(gets)   # a step that raised is none

@into(loops)
class BackwardTwice(Learner):
    def _backward(self):
        self.loss_grad.backward(retain_graph=True)
        self.loss_grad.backward()

@into(loops)
class GradientPenalty(Learner):
    "A penalty on a gradient, in the backward"
    def _backward(self):
        ps = [p for p in self.model.head.parameters() if p.requires_grad]
        gs = torch.autograd.grad(self.loss_grad, ps, create_graph=True, allow_unused=True)
        (self.loss_grad+sum(g.square().sum() for g in gs if g is not None)).backward()

@into(loops)
class HessianBeside(Learner):
    "`autograd.grad` after the backward, for a second derivative"
    def _backward(self):
        self.loss_grad.backward(create_graph=True)
        w = self.model.head.weight
        if w.grad is not None and w.grad.requires_grad: torch.autograd.grad(w.grad.square().sum(), w, allow_unused=True)

@into(loops)
class GradsByHand(Learner):
    "No backward: `autograd.grad`, written into `p.grad`"
    def _backward(self):
        ps = [p for p in self.model.parameters() if p.requires_grad]
        for p,g in zip(ps, torch.autograd.grad(self.loss_grad, ps, allow_unused=True)): p.grad = g

@into(loops)
class NoInnerEvents(Learner):
    "Forward, backward and step without an event"
    def _do_one_batch(self):
        self.pred = self.model(*self.xb)
        self.loss_grad = self.loss_func(self.pred, *self.yb)
        self.loss = self.loss_grad.clone()
        if not self.training: return
        self.loss_grad.backward()
        self.opt.step()
        self.opt.zero_grad()

@into(loops)
class NoAfterBackward(Learner):
    def _do_grad_opt(self):
        self('before_backward')
        self._backward()
        self._with_events(self._step, 'step', CancelStepException)
        self.opt.zero_grad()

@into(loops)
class NoBeforeStep(Learner):
    def _do_grad_opt(self):
        self._with_events(self._backward, 'backward', CancelBackwardException)
        self._step()
        self('after_step')
        self.opt.zero_grad()

@into(loops)
class NoBatchEvents(Learner):
    def one_batch(self, i, b):
        self.iter = i
        self._split(b)
        self._do_one_batch()

@into(loops)
class NoEpochEvents(Learner):
    def _do_fit(self):
        for self.epoch in range(self.n_epoch): self._do_epoch()

@into(loops)
class NoTrainEvents(Learner):
    def _do_epoch_train(self):
        self.dl,self.training = self.dls.train,True
        self.all_batches()

@into(loops)
class NoFitEvents(Learner):
    def fit(self, n_epoch, lr=None, wd=None, cbs=None, **kwargs):
        with self.added_cbs(cbs):
            if not self.opt: self.create_opt()
            self.opt.set_hypers(lr=self.lr if lr is None else lr)
            self.n_epoch = n_epoch
            self._do_fit()

@into(loops)
class NoEvents(Learner):
    def __call__(self, event_name):
        if event_name in ('before_fit','before_train'): super().__call__(event_name)

@into(loops)
class TwoSteps(Learner):
    "Twice through each batch"
    def _do_one_batch(self):
        super()._do_one_batch()
        if self.training: super()._do_one_batch()

@into(loops)
class StepInside(Learner):
    "The step moves weights there and back"
    def _step(self):
        ps = [p for p in self.model.parameters() if p.is_floating_point() and not p.is_meta]
        old = [p.detach().clone() for p in ps]
        self.opt.step()
        with torch.no_grad():
            for p,o in zip(ps, old): p.lerp_(o, .5)

@into(loops)
class ScaledInStep(Learner):
    def _step(self):
        for p in self.model.parameters():
            if p.grad is not None: p.grad = p.grad*.1
        super()._step()

@into(loops)
class ChangesModel(Learner):
    "Each batch trains another copy of the model"
    def one_batch(self, i, b):
        if i==1 and self.training: self.model = deepcopy(self.model)
        super().one_batch(i, b)

@into(loops)
class MethodsNamedAsEvents(Learner):
    "fastai calls them for every callback that lacks the event"
    def after_cancel_fit(self): self.world.calls['learn.after_cancel_fit'] += 1
    def after_validate(self): self.world.calls['learn.after_validate'] += 1

@into(loops)
class Slots(Learner):
    "An attribute of every name that ours might look for"
    scaler = lr_finder = recorder = phase = 'of the learner'

@into(loops)
class DuckOptimizer(Learner):
    def create_opt(self): self.opt = Duck(self.model.parameters(), self.lr)

@into(loops)
class LossIsNoTensor(Learner):
    "What a callback sees as loss is a number, or nothing"
    def _backward(self):
        super()._backward()
        self.loss = None if self.iter else 1.5

no_recorder = {'NoEvents','DuckOptimizer','LossIsNoTensor','NoTrainEvents'}   # fastai's Recorder wants more

# --- what somebody's callback does. Each gets the callback

actions = {}
harmless = set()   # those that leave gradients and the order of things alone

def harms_nothing(f):
    harmless.add(f.__name__)
    return f

def grads(cb): return [p.grad for p in cb.learn.model.parameters() if p.grad is not None]

def raises(exc):
    def act(cb): raise exc('fuzz')
    act.__name__ = f'raise_{exc.__name__}'
    return act

for exc in (CancelBatchException, CancelBackwardException, CancelStepException, CancelTrainException, CancelEpochException, CancelFitException,
            CancelValidException, RuntimeError, KeyboardInterrupt, SystemExit, StopIteration): into(actions)(raises(exc))

@into(actions)
def raise_without_message(cb): raise ValueError

@into(actions)
def zero_gradients(cb): [g.zero_() for g in grads(cb)]

@into(actions)
def drop_gradients(cb):
    for p in cb.learn.model.parameters(): p.grad = None

@into(actions)
def clip_norm(cb): nn.utils.clip_grad_norm_([p for p in cb.learn.model.parameters()], .1)

@into(actions)
def clip_value(cb): nn.utils.clip_grad_value_(cb.learn.model.parameters(), .01)

@into(actions)
def nan_gradients(cb): [g.fill_(float('nan')) for g in grads(cb)]

@into(actions)
def replace_gradients(cb):
    for p in cb.learn.model.parameters():
        if p.grad is not None: p.grad = p.grad*.5

@into(actions)
def nan_loss(cb): cb.learn.loss_grad = cb.learn.loss_grad*float('nan')

@into(actions)
def scale_loss(cb): cb.learn.loss_grad = cb.learn.loss_grad*3

@into(actions)
def drop_loss(cb): cb.learn.loss = None

@into(actions)
def drop_targets(cb): cb.learn.yb = ()

@into(actions)
def own_backward(cb):
    "Runs the backward itself and cancels fastai's"
    cb.learn.loss_grad.backward()
    raise CancelBackwardException('own')

@into(actions)
def extra_backward(cb): cb.learn.loss_grad.backward(retain_graph=True)

@into(actions)
def autograd_grad(cb): torch.autograd.grad(cb.learn.loss_grad, cb.learn.model.head.weight, retain_graph=True, allow_unused=True)

@into(actions)
def forward_again(cb): cb.learn.model(*cb.learn.xb)

@into(actions)
@harms_nothing
def forward_without_grad(cb):
    with torch.no_grad(): cb.learn.model(*cb.learn.xb)

@into(actions)
def own_step(cb): cb.learn.opt.step()

def unlocked(f):
    "fastai's lock is not reentrant: validate within validate would wait for ever"
    def act(cb):
        if not cb.learn.lock.locked(): f(cb)
    act.__name__ = f.__name__
    return act

@into(actions)
@unlocked
def validate_inside(cb): cb.learn.validate()

@into(actions)
@unlocked
def get_preds_inside(cb): cb.learn.get_preds()

@into(actions)
@harms_nothing
def deepcopy_model(cb): cb.world.look_at(deepcopy(cb.learn.model))

@into(actions)
@harms_nothing
def save_model(cb):
    f = io.BytesIO()
    torch.save(cb.learn.model, f)
    f.seek(0)
    cb.world.look_at(torch.load(f, weights_only=False))

@into(actions)
def export_learner(cb): pickle.dumps(cb.learn)

@into(actions)
def deepcopy_learner(cb): cb.world.look_at(deepcopy(cb.learn).model)

@into(actions)
@harms_nothing
def script_head(cb): torch.jit.script(cb.learn.model.head)

@into(actions)
@harms_nothing
def trace_head(cb): torch.jit.trace(cb.learn.model.head, torch.ones(BATCH, WIDTH), check_trace=False)

@into(actions)
def freeze_layers(cb): cb.learn.model.layers.requires_grad_(False)

@into(actions)
def freeze_all(cb): cb.learn.model.requires_grad_(False)

@into(actions)
def thaw(cb): [p.requires_grad_(p.is_floating_point()) for p in cb.learn.model.parameters()]

@into(actions)
def new_optimizer(cb): cb.learn.create_opt()

@into(actions)
def new_model(cb):
    cb.learn.model = deepcopy(cb.learn.model)
    cb.learn.create_opt()

@into(actions)
def replace_head(cb):
    cb.learn.model.head = nn.Linear(WIDTH, CLASSES)
    cb.learn.create_opt()

@into(actions)
def wrap_model(cb): cb.learn.model = Wrapper(cb.learn.model)

class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module,self.head,self.layers = module,module.head,module.layers
    def forward(self, *args): return self.module(*args)

@into(actions)
def model_to_double(cb): cb.learn.model.double()

@into(actions)
def eval_mode(cb): cb.learn.model.eval()

@into(actions)
def user_forward_hook(cb): cb.learn.model.head.register_forward_hook(double_output)

@into(actions)
def user_backward_hook(cb): cb.learn.model.head.register_full_backward_hook(see)

@into(actions)
def clear_all_hooks(cb):
    for m in cb.learn.model.modules():
        m._forward_hooks.clear()
        m._forward_pre_hooks.clear()

@into(actions)
def step_in_backward(cb):
    "The optimizer's work as gradients come"
    def step(p):
        with torch.no_grad(): p.sub_(p.grad*.01)
        p.grad = None
    w = cb.learn.model.head.weight
    if w.requires_grad: w.register_post_accumulate_grad_hook(step)

@into(actions)
@harms_nothing
def draw_numbers(cb): return random.random(),np.random.rand(),torch.rand(1)

@into(actions)
def change_lr(cb): cb.learn.opt.set_hypers(lr=.5)

@into(actions)
def scaler_that_is_none(cb): cb.learn.scaler = Keep()

@into(actions)
def remove_itself(cb): cb.learn.remove_cb(cb)

@into(actions)
def add_clipper(cb): cb.learn.add_cb(GradientClip(.1))

@into(actions)
def remove_recorder(cb):
    if hasattr(cb.learn, 'recorder'): cb.learn.remove_cb(cb.learn.recorder)

@into(actions)
def remove_ours(cb):
    for c in cb.world.ours: cb.learn.remove_cb(c)

@into(actions)
def readd_ours(cb):
    for c in cb.world.ours:
        if c.learn is None: cb.learn.add_cb(c)

@into(actions)
def take_off_and_put_back(cb):
    with cb.learn.removed_cbs([c for c in cb.world.ours if c.learn is not None]): pass

@into(actions)
def add_one_of_ours(cb):
    for c in cb.world.spare():
        cb.world.ours.append(c)
        cb.learn.add_cb(c)

@into(actions)
def switch_ours_off(cb):
    for c in cb.world.ours: c.run = False

@into(actions)
def switch_ours_on(cb):
    for c in cb.world.ours: c.run = True

@into(actions)
def read_record(cb): cb.world.read()

@into(actions)
def change_ours(cb): cb.world.change()

class Actor(Callback):
    "Does something when its event comes for the `at`-th time, and ever after if asked to"
    def __init__(self, act, world):
        self.act,self.world,self.n,self.busy = act,world,0,False
        self.order = act.order
        setattr(self, act.event, self.come)
    def come(self):
        if self.busy: return
        self.n += 1
        if self.n<self.act.at or self.n>self.act.at and not self.act.always: return
        self.busy = True
        try: actions[self.act.what](self)
        finally: self.busy = False

class Fixer(Callback):
    "Makes of what the loss function said a loss that can be differentiated"
    order = -50
    def after_loss(self):
        if isinstance(self.learn.loss_grad, tuple): self.learn.loss_grad = self.learn.loss_grad[0]
        elif self.learn.loss_grad.dim(): self.learn.loss_grad = self.learn.loss_grad.topk(1).values.mean()

class NoValid(Callback):
    def before_validate(self): raise CancelValidException('not needed')

class EMA(Callback):
    "A running mean of the weights, in a copy of the model"
    order = 30
    def before_train(self): self.ema = deepcopy(self.learn.model)
    def after_step(self):
        with torch.no_grad():
            for e,p in zip(self.ema.parameters(), self.learn.model.parameters()):
                if e.is_floating_point() and not e.is_meta: e.lerp_(p, .1)

companions = dict(
    clip=partial(GradientClip, .1),
    clip_inf=partial(GradientClip, .1, norm_type=float('inf')),
    accumulate=partial(GradientAccumulation, 2*BATCH),
    scaled=partial(CPUAmp, torch.float32, init_scale=2.**10, growth_interval=2),
    overflow=partial(CPUAmp, torch.float32, init_scale=2.**127),
    bf16=partial(CPUAmp, torch.bfloat16, enabled=False),
    fp16=partial(CPUAmp, torch.float16, init_scale=2.**10),
    ema=EMA,
    bn_freeze=BnFreeze,
    short=partial(ShortEpochCallback, .4),
    early=EarlyStoppingCallback,
    save=SaveModelCallback,
    nan_stop=TerminateOnNaNCallback,
    mixup=MixUp)
plain_companions = {'clip','ema','bn_freeze','short','early','save','scaled'}

# --- how torch and numpy are set meanwhile

modes = dict(
    usual=nullcontext,
    anomaly=partial(torch.autograd.detect_anomaly, check_nan=False),
    numpy_raises=partial(np.errstate, all='raise'))

def mode(f):
    modes[f.__name__] = contextmanager(f)
    return f

@mode
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try: yield
    finally: torch.set_default_dtype(torch.float32)

@mode
def deterministic():
    torch.use_deterministic_algorithms(True)
    try: yield
    finally: torch.use_deterministic_algorithms(False)

@mode
def global_hook():
    "A hook on every module of the process"
    handle = nn.modules.module.register_module_forward_hook(see)
    try: yield
    finally: handle.remove()

# --- what the user calls

plans = {}

@into(plans)
def fit_1(learn, cbs): learn.fit(1, cbs=cbs)

@into(plans)
def fit_2(learn, cbs): learn.fit(2, cbs=cbs)

@into(plans)
def fit_reset(learn, cbs): learn.fit(1, cbs=cbs, reset_opt=True)

@into(plans)
def fit_resumed(learn, cbs): learn.fit(2, cbs=cbs, start_epoch=1)

@into(plans)
def one_cycle(learn, cbs): learn.fit_one_cycle(1, 1e-2, cbs=cbs)

@into(plans)
def fine_tune(learn, cbs): learn.fine_tune(1, freeze_epochs=1, cbs=cbs)

@into(plans)
def lr_find(learn, cbs): learn.lr_find(num_it=4, show_plot=False, suggest_funcs=None)

@into(plans)
def validate(learn, cbs): learn.validate(cbs=cbs)

@into(plans)
def get_preds(learn, cbs): learn.get_preds()

@into(plans)
def freeze(learn, cbs): learn.freeze()

@into(plans)
def unfreeze(learn, cbs): learn.unfreeze()

@into(plans)
def bare_batch(learn, cbs):
    "One batch without a fit"
    if not learn.opt: learn.create_opt()
    learn.training = True
    learn.one_batch(0, learn.dls.train.batches[0])

@into(plans)
def bare_epoch(learn, cbs):
    if not learn.opt: learn.create_opt()
    learn._do_epoch_train()

@into(plans)
def export(learn, cbs): pickle.dumps(learn)

@into(plans)
def add_adapter(learn, cbs):
    learn.model.layers.append(nn.Linear(WIDTH, WIDTH))
    learn.create_opt()

@into(plans)
def read(learn, cbs): learn.world.read()

@into(plans)
def change(learn, cbs): learn.world.change()

@into(plans)
def reset(learn, cbs):
    for c in learn.world.ours: c.reset()

@into(plans)
def off_and_on(learn, cbs):
    ours = [c for c in learn.world.ours if c.learn is learn]
    learn.remove_cbs(ours)
    learn.fit(1)
    learn.add_cbs(ours)

trainings = 'fit_1 fit_1 fit_2 fit_2 fit_reset fit_resumed one_cycle fine_tune lr_find'.split()
changes_ours = set("""remove_ours readd_ours take_off_and_put_back add_one_of_ours switch_ours_off switch_ours_on change_ours
    reset change off_and_on bare_batch bare_epoch""".split())

# --- our callbacks

def numel(g): return torch.tensor(float(g.numel()))

stats_options = dict(
    kind=['both','both','output','param'],
    every=[1,1,2,3],
    hist=[False,False,True,'all'],
    keep=[10_000,None,1,3],
    threshold=[1.,0.,.01],
    extra=[None,None,dict(n=numel)],
    include=[None,None,'head','e'],
    modules=[None,None,'head'])
norm_options = dict(
    every=[1,1,2,3],
    update_every=[None,6],   # a multiple of each `every`
    show=[False,False,True])
changed = dict(   # what an argument is set to in mid-fit or between fits
    kind='both',
    every=1,
    hist=True,
    keep=2,
    threshold=.5,
    extra=dict(n=numel),
    update_every=6,
    show=True,
    include=None)

# --- a case

@dataclass
class Act:
    what:str
    event:str
    at:int
    always:bool
    order:float

@dataclass
class Case:
    net:str = 'Net'
    layers:list = field(default_factory=list)
    output:str = 'tensor'
    target:str = 'classes'
    loss:str = 'mean_loss'
    opt:str = 'sgd'
    loop:str = 'Plain'
    companions:list = field(default_factory=list)
    acts:list = field(default_factory=list)
    plan:list = field(default_factory=list)
    batches:int = 2
    valid:bool = False
    recorder:bool = True
    ours:list = field(default_factory=list)   # (class, arguments)
    ours_first:bool = True
    passed_to:str = 'Learner'   # or 'fit'
    change:str = 'hist'         # the argument that is changed
    folder:bool = False
    mode:str = 'usual'

def draw_act(rng):
    event = rng.choice(batch_events if rng.random()<.6 else events)
    return Act(rng.choice(list(actions)), event, rng.choice([1,1,2,3]), rng.random()<.25, rng.choice(orders))

def draw_ours(rng):
    res = []
    which = rng.choice(['both','both','both','stats','norm'])
    for name,options in (('stats',stats_options), ('norm',norm_options)):
        if which in (name,'both'): res.append((name, {k:rng.choice(v) for k,v in options.items() if rng.random()<.5}))
    return res

def draw(seed):
    "The case of a seed. Most ingredients are ordinary, so that most cases train"
    rng = random.Random(seed)
    def odd(table, usual, p): return rng.choice(list(table)) if rng.random()<p else usual
    every_layer = [*layers, *(f'of_{c}' for c in containers)]
    quiet = rng.random()<.3   # nobody touches gradients: what was recorded can be checked
    case = Case(
        net=odd(nets, 'Net', .1),
        layers=[rng.choice(every_layer) for _ in range(rng.choice([0,1,1,2,2,3]))],
        output=odd(containers, 'tensor', .25),
        target=odd(targets, 'classes', .2),
        loss=odd(losses, 'mean_loss', .3),
        opt=odd(optimizers, 'sgd', .5),
        loop=odd(loops, 'Plain', .4),
        companions=rng.sample(list(companions), rng.choice([0,0,0,1,1,2])),
        acts=[draw_act(rng) for _ in range(rng.choice([0,1,1,2,2,3]))],
        plan=[rng.choice(trainings)],
        batches=rng.choice([1,2,3]),
        valid=rng.random()<.3,
        recorder=rng.random()<.8,
        ours=draw_ours(rng),
        ours_first=rng.random()<.5,
        passed_to=rng.choice(['Learner','Learner','fit']),
        change=rng.choice(list(changed)),
        folder=rng.random()<.05,
        mode=odd(modes, 'usual', .1))
    for _ in range(rng.choice([0,0,1,1,2])): case.plan.insert(rng.randrange(len(case.plan)+1), rng.choice([*plans, *trainings]))
    if quiet: calm(case)
    if case.loop in no_recorder: case.recorder = False
    if {'early','save'} & set(case.companions): case.valid = True
    whats = {a.what for a in case.acts}
    if whats & {'new_model','replace_head','wrap_model'} or case.loop=='ChangesModel':
        for _,kw in case.ours: kw.pop('modules', None)   # a module that is not in the model is refused, as documented
    if 'wrap_model' in whats:
        for _,kw in case.ours: kw.pop('include', None)   # so is a pattern that matches nothing
    return case

def calm(case):
    "Take out what touches gradients, batches and steps, or our callbacks"
    case.loop,case.passed_to = 'Plain','Learner'
    case.acts = [a for a in case.acts if a.what in harmless]
    case.companions = [c for c in case.companions if c in plain_companions]
    case.layers = [l for l in case.layers if l not in disturbing]
    case.plan = [p for p in case.plan if p not in changes_ours] or ['fit_1']
    if case.opt in ('raising','lbfgs'): case.opt = 'sgd'

# --- running it

class Batches:
    "A loader that gives what it holds"
    def __init__(self, batches): self.batches,self.dataset,self.device = batches,batches,None
    def __len__(self): return len(self.batches)
    def __iter__(self): return iter(self.batches)
    def to(self, device): return self
    def new(self, **kwargs): return self

def batches(case, n):
    g = torch.Generator().manual_seed(n)
    res = []
    for _ in range(n):
        x,y = torch.randn(BATCH, WIDTH, generator=g),torch.randint(CLASSES, (BATCH,), generator=g)
        res.append((x, *targets[case.target](y)))
    return Batches(res)

def hooks(model):
    "How many hooks of each kind stand on each module"
    kinds = '_forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks _state_dict_hooks'.split()
    return {n:[len(m.__dict__.get(k) or ()) for k in kinds] for n,m in model.named_modules()}

class World:
    "What the ingredients of one run share, and what they saw"
    def __init__(self, case, with_ours, folder):
        self.case,self.with_ours,self.folder = case,with_ours,folder
        self.ours,self.log,self.copies,self.calls = [],[],[],Counter()
        self.got = []    # of each step of `fit`: parameter -> norm of its gradient
        self.head = []   # of each backward of `fit`: norm of the gradient of the head's output
        self.finding = False
    def __reduce__(self): return World,(self.case, False, None)
    def __deepcopy__(self, memo): return self

    def make_ours(self, learn):
        for name,kw in self.case.ours if self.with_ours else ():
            kw = dict(kw)
            if kw.get('modules')=='head': kw['modules'] = [learn.model.head]
            if self.case.folder: kw['folder'] = f'{self.folder}/{name}'
            self.ours.append((GradStatsCallback if name=='stats' else GradNormCallback)(**kw))
        return self.ours
    def spare(self): return [GradStatsCallback(), GradNormCallback()][:1+len(self.ours)%2] if self.with_ours else []
    def look_at(self, model): self.copies.append(hooks(model))
    def read(self):
        for c in self.ours: len(c.df),repr(c),c._repr_html_()
    def change(self):
        "As a user might: an argument that is set anew, or a ValueError, which is the user's"
        for c in self.ours:
            if not hasattr(type(c)(), self.case.change) or self.case.change not in c.__dict__: continue
            try: setattr(c, self.case.change, changed[self.case.change])
            except (ValueError,TypeError,AttributeError): pass

    def head_gradient(self, g):
        if not self.finding: self.head.append(norm(g))
    def norms_of(self, learn):
        ps = learn.model.named_parameters()
        return {n:norm(p.grad) for n,p in ps if p.requires_grad and p.grad is not None}

def norm(g):
    g = g.detach()
    if g.layout!=torch.strided: g = g.to_dense()
    return float(np.linalg.norm(g.to(torch.complex128 if g.is_complex() else torch.float64).resolve_neg().numpy().ravel()))

class Log(Callback):
    "Every event, with the loss"
    order = 70
    def __init__(self, world):
        self.world = world
        for e in events: setattr(self, e, partial(self.note, e))
    def note(self, e):
        d = self.learn.__dict__
        self.world.finding = 'lr_finder' in d
        loss = bits(d.get('loss')) if e in ('after_loss','after_batch') else None
        self.world.log.append((e, d.get('epoch'), d.get('iter'), d.get('training'), loss))

def bits(o):
    "A value, such that two are equal where every bit is"
    if isinstance(o, dict): return {str(k):bits(v) for k,v in o.items()}
    if isinstance(o, (list,tuple,L)): return [bits(v) for v in o]
    if not isinstance(o, torch.Tensor): return o if isinstance(o, (int,str,bytes,type(None))) else repr(o)
    if nn.parameter.is_lazy(o) or o.is_meta: return f'{type(o).__name__} without data'
    t = o.detach()
    if t.is_nested: return [bits(v) for v in t.unbind()]
    if t.layout!=torch.strided: t = t.to_dense()
    t = t.resolve_conj().resolve_neg().contiguous()
    data = t.view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b''
    return f'{t.dtype} {tuple(t.shape)} {hashlib.md5(data).hexdigest()} {t.flatten()[:2].tolist()}'

def state(learn, world):
    "All that is left behind"
    model,opt = learn.model,learn.opt
    ps,ms = dict(model.named_parameters()),dict(model.named_modules())
    res = dict(
        weights={n:bits(p) for n,p in ps.items()},
        gradients={n:bits(p.grad) for n,p in ps.items()},
        requires={n:p.requires_grad for n,p in ps.items()},
        buffers={n:bits(b) for n,b in model.named_buffers()},
        training={n:m.training for n,m in ms.items()},
        counts=[m.n for m in ms.values() if isinstance(m, Counting)],
        optimizer=bits(opt.state_dict()) if opt else None,
        hypers=repr(getattr(opt, 'hypers', None)),
        torch_rng=bits(torch.get_rng_state()),
        numpy_rng=bits(np.random.get_state()[1].tolist()),
        python_rng=repr(random.getstate()),
        events=list(world.log),
        copies=list(world.copies),
        calls=dict(world.calls),
        grad_enabled=torch.is_grad_enabled(),
        locked=learn.lock.locked())
    if hasattr(learn, 'recorder') and learn.recorder and not isinstance(learn.recorder, str):
        res['recorded'] = bits([getattr(learn.recorder, a, None) for a in ('lrs','losses','iters')])
        shown = world.case.change=='show' or any(kw.get('show') for _,kw in world.case.ours)   # a column of ours is in the table
        if not shown: res['table'] = bits(getattr(learn.recorder, 'values', None))
    return res

def message(e):
    "What an exception says, without what differs from run to run"
    text = 'too deep' if isinstance(e, RecursionError) else str(e)
    return type(e).__name__,re.sub(r'0x[0-9a-f]+|/\S*|_mangle_\d+', '...', text)

def build(case, world):
    set_seed(0)
    net = nets[case.net](case.layers, case.output, world)
    dls = DataLoaders(batches(case, case.batches), batches(case, 1))
    dls.n_inp,dls.path = 1,world.folder
    theirs = [Actor(a, world) for a in case.acts]+[companions[c]() for c in case.companions]+[Log(world)]
    if case.loss in ('per_sample','one_element','tuple_loss'): theirs.append(Fixer())
    if not case.valid: theirs.append(NoValid())
    if not case.recorder: theirs.append(TrainEvalCallback())
    learn = loops[case.loop](dls, net, loss_func=Loss(case), opt_func=optimizers[case.opt], lr=.05, splitter=halves,
                             default_cbs=case.recorder, path=world.folder)
    learn.world = world
    ours = world.make_ours(learn)
    attached = ours if case.passed_to=='Learner' else []
    learn.add_cbs([*attached, *theirs] if case.ours_first else [*theirs, *attached])
    return learn

def halves(model): return [params(model.layers), params(model.head)] if params(model.layers) else [params(model.head)]

@dataclass
class Result:
    outcomes:list = field(default_factory=list)   # of each call: 'ok' or the exception
    states:list = field(default_factory=list)
    hooks_after:list = field(default_factory=list)
    hooks_left:dict = None
    callbacks_left:list = None
    attributes_left:list = None
    said:Counter = None
    trained:int = 0

def reset_modes():
    "What an interrupted batch may leave on: autocast, no gradients"
    torch.set_grad_enabled(True)
    torch.set_autocast_enabled('cpu', False)
    torch.clear_autocast_cache()
    depth = torch.autocast_increment_nesting()
    while depth>0: depth = torch.autocast_decrement_nesting()
    while depth<0: depth = torch.autocast_increment_nesting()

def run(case, with_ours, folder):
    "One run of a case, from clean modes to clean modes"
    old_hook = threading.excepthook
    threading.excepthook = see   # what is raised in a thread is raised again where it is missed
    reset_modes()
    try: return _run(case, World(case, with_ours, folder))
    finally:
        reset_modes()
        threading.excepthook = old_hook

def _run(case, world):
    res = Result()
    with warnings.catch_warnings(record=True) as said, redirect_stdout(io.StringIO()):
        warnings.simplefilter('always')
        learn = build(case, world)
        for name in case.plan:
            cbs = [c for c in world.ours if c.learn is None] if case.passed_to=='fit' else None
            try:
                with learn.no_bar(), learn.no_logging(), modes[case.mode](): plans[name](learn, cbs)
                res.outcomes.append((name, 'ok'))
            except BaseException as e: res.outcomes.append((name, *message(e)))
            res.states.append(state(learn, world))
            res.hooks_after.append(hooks(learn.model))
            learn.lock = threading.Lock()   # fastai keeps it where `validate` was interrupted
        learn.remove_cbs([c for c in world.ours if c.learn is learn])
        res.hooks_left = hooks(learn.model)
        res.callbacks_left = [type(c).__name__ for c in learn.cbs]
        res.attributes_left = sorted(learn.__dict__)
        for c in world.ours: c.df
    sentences = [str(w.message).split('\n')[0] for w in said if issubclass(w.category, UserWarning)]
    res.said = Counter(s for s in sentences if 'shadowing' not in s)
    res.trained = sum(e[0]=='before_fit' for e in world.log)
    return res,world

def differences(a, b, at=''):
    "Where two nested values differ"
    if isinstance(a, dict) and isinstance(b, dict) and a.keys()==b.keys():
        return [d for k in a for d in differences(a[k], b[k], f'{at}.{k}')]
    if isinstance(a, list) and isinstance(b, list) and len(a)==len(b):
        return [d for i,(x,y) in enumerate(zip(a, b)) for d in differences(x, y, f'{at}[{i}]')]
    return [] if a==b or a!=a and b!=b else [f'{at}: {a!r} without ours, {b!r} with']

def is_plain(case):
    "Does nobody touch gradients, batches and steps, or our callbacks?"
    whats = {a.what for a in case.acts}
    undisturbed = whats<=harmless and not set(case.layers) & disturbing and set(case.companions)<=plain_companions
    ours_stay = case.passed_to=='Learner' and not changes_ours & {*whats, *case.plan}
    return case.loop=='Plain' and case.opt not in ('raising','lbfgs') and undisturbed and ours_stay

disturbing = {'RaisesInForward','InterruptsInForward','RaisesInBackward','BackwardInForward','ClearsHooks',
              'GrowsAndSwaps'}   # the last: the optimizer does not know its new parameter

def check_record(case, world):
    "Steps and parameter rows are what the optimizer got; the head's output rows what autograd said"
    totals = [sum(v*v for v in g.values())**.5 if g else float('nan') for g in world.got]
    clipped = 'clip' in case.companions
    errors = []
    for cb,(name,kw) in zip(world.ours, case.ours):
        if kw.get('every', 1)!=1 or kw.get('keep', 10_000) not in (None,10_000): continue
        df = cb.df
        df = df[df['phase']=='fit']
        if name=='norm':
            df = df[~df['skipped'].astype(bool)]
            errors += differs(df['clipped_norm'].tolist(), totals, 'clipped_norm')
            if not clipped: errors += differs(df['norm'].tolist(), totals, 'norm')
        elif not kw.get('include') and not kw.get('modules'):
            kind = kw.get('kind', 'both')
            par,out = df[(df['kind']=='param') & ~df['skipped'].astype(bool)],df[(df['kind']=='output') & (df['name']=='head')]
            if kind!='output' and not clipped:
                want = [(n, v) for g in world.got for n,v in g.items()]
                names,want_names = par['name'].tolist(),[n for n,_ in want]
                if names!=want_names: errors.append(f"parameter rows {names}, expected {want_names}")
                else: errors += differs(par['norm'].tolist(), [v for _,v in want], 'parameter rows')
            if kind!='param' and 'scaled' not in case.companions:
                errors += differs(out['norm'].tolist(), world.head, 'output rows of the head')
    return errors

def differs(got, want, what):
    expected = np.array(want, dtype=np.float64).astype(np.float32)
    same = len(got)==len(want) and np.allclose(got, expected, rtol=1e-4, atol=1e-30, equal_nan=True)
    return [] if same else [f'{what}: {got}, expected {want}']

def faults(case):
    "What is wrong with ours in this case"
    with TemporaryDirectory() as a, TemporaryDirectory() as b:
        bare,_ = run(case, False, a)
        ours,world = run(case, True, b)
        res = differences(bare.outcomes, ours.outcomes, 'outcome')
        if res: return res
        for name,x,y in zip(case.plan, bare.states, ours.states): res += differences(x, y, f'after {name}')
        if case.loop not in eventless: res += differences(bare.hooks_after, ours.hooks_after, 'hooks after')
        for what in ('hooks_left','callbacks_left'): res += differences(getattr(bare, what), getattr(ours, what), what)
        res += differences(sorted(set(bare.attributes_left)), sorted(set(ours.attributes_left)), 'attributes_left')
        most = max(1, ours.trained)*len(world.ours)   # once a fit and callback
        res += [f'said {n} times in {ours.trained} fits: {m}' for m,n in ours.said.items() if m not in bare.said and n>most]
        if not res and is_plain(case): res += check_record(case, world)
        return res

eventless = {'NoEvents','NoTrainEvents','NoEpochEvents','NoFitEvents'}   # where nothing tells that training is over

# --- the test

def seeds():
    a,b = os.environ.get('GRADSTATS_FUZZ', '0:500').split(':')
    return range(int(a), int(b))

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    if 'torch._dynamo' in sys.modules: sys.modules['torch._dynamo'].reset()   # what another seed compiled is not this one's
    yield
    torch.set_num_threads(n)

@pytest.mark.slow
@pytest.mark.parametrize('seed', seeds())
def test_same_training(seed):
    "The same outcome of each call, the same bits left behind, no hook of ours, and what was recorded is right."
    case = draw(seed)
    wrong = faults(case)
    assert not wrong, '\n'.join([*(w[:500] for w in wrong[:8]), '', str(case)])

def smaller(case):
    "Cases with one ingredient less"
    for f in ('layers','companions','acts','plan','ours'):
        v = getattr(case, f)
        for i in range(len(v)): yield replace(case, **{f:v[:i]+v[i+1:]})
    for f,v in vars(Case()).items():
        if not isinstance(v, list) and getattr(case, f)!=v: yield replace(case, **{f:v})
    for i,(name,kw) in enumerate(case.ours):
        for k in kw: yield replace(case, ours=[*case.ours[:i], (name, {a:b for a,b in kw.items() if a!=k}), *case.ours[i+1:]])

def kind_of(wrong):
    "The same for the same fault in another place"
    if not wrong: return None
    return re.sub(r"\d+|'[^']*'", '#', wrong[0].split(': ')[0]+wrong[0][-60:]),"'ok') without" in wrong[0]

def shrink(case):
    "The smallest case that fails in the same way"
    kind = kind_of(faults(case))
    while True:
        less = next((c for c in smaller(deepcopy(case)) if kind_of(faults(c))==kind), None)
        if less is None: return case
        case = less

if __name__=='__main__':
    torch.set_num_threads(1)
    for seed in sys.argv[1:]:
        case = shrink(draw(int(seed)))
        print('\n'.join([seed, str(case), *faults(case)[:5]]))
