"Models that several tests train."
import torch,torchvision.models as tv
from collections import namedtuple
from dataclasses import dataclass
from fastai.basics import *
from torch import nn
from torchvision.models.convnext import CNBlockConfig,ConvNeXt

# --- small ones of torchvision

def random_pictures(n=4, size=32, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n,3,size,size, generator=g, dtype=dtype),torch.randint(10, (n,), generator=g)

def vit():
    return tv.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10,
                                dropout=.1, attention_dropout=.1)
def swin(): return tv.SwinTransformer(patch_size=[4,4], embed_dim=16, depths=[2,2], num_heads=[2,2], window_size=[4,4], num_classes=10)
def convnext(): return ConvNeXt([CNBlockConfig(16,32,1), CNBlockConfig(32,None,2)], stochastic_depth_prob=.3, layer_scale=.1, num_classes=10)

# --- from functions

class FunctionNet(nn.Module):
    "A model from a function of itself and its input; keywords become submodules and parameters"
    def __init__(self, forward, **kw):
        super().__init__()
        self.f = forward
        for k,v in kw.items(): setattr(self, k, v)
    def forward(self, x): return self.f(self, x)

class FunctionWithWeight(nn.Module):
    "A function with a parameter of its own"
    def __init__(self, f, n=4):
        super().__init__()
        self.f,self.w = f,nn.Parameter(torch.linspace(.5,1.5,n))
    def forward(self, *args): return self.f(self.w, *args)

NamedPair = namedtuple('Pair', 'a b')
@dataclass
class DataPair: a:object; b:object = None

def random_vectors(n=6, d=4, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(n,d, dtype=dtype),torch.randint(3, (n,))

def tensor_leaves(o):
    "Tensors of nested outputs, in order"
    if isinstance(o, (int,str,type(None))): return []
    values = o.values() if isinstance(o, dict) else [o.a,o.b] if isinstance(o, (DataPair,NamedPair)) else o
    return [t for v in values for t in ([v] if isinstance(v, Tensor) else tensor_leaves(v))]

class ReturnsWrapped(nn.Module):
    "A layer whose output is wrapped by a function"
    def __init__(self, wrap):
        super().__init__()
        self.wrap,self.w = wrap,nn.Parameter(torch.linspace(-1, 1, 48).view(6,8))
    def forward(self, x): return self.wrap((x@self.w).tanh())

# --- with a gradient of our choice

class HasGradient(nn.Module):
    "Has exactly this gradient, as output and as parameter"
    def __init__(self, g):
        super().__init__()
        self.register_buffer('g', g)
        self.w = nn.Parameter(torch.zeros_like(g))
    def forward(self, x): return (self.w+0.)

class InjectGradient(torch.autograd.Function):
    "A loss whose gradient is `g`"
    @staticmethod
    def forward(ctx, x, g):
        ctx.save_for_backward(g)
        return x.detach().sum().float()
    @staticmethod
    def backward(ctx, go): return ctx.saved_tensors[0].clone(),None

# --- that change from call to call

class Branches(nn.Module):
    "One of two layers, in turn"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.never = nn.Linear(192,10),nn.Linear(192,10),nn.Linear(2,2)
        self.n = 0
    def forward(self, x):
        self.n += 1
        return (self.a if self.n%2 else self.b)(x.flatten(1))
