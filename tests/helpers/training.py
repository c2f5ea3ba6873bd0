"Small Learners, and ways to fit them."
import warnings
from contextlib import contextmanager
from copy import deepcopy
from fastai.basics import *
from torch import nn
from fastai_gradstats import GradNormCallback,GradStatsCallback
from helpers.callbacks import TrainOnly

host = torch.device('cpu')
fsdp_runs_here = hasattr(torch.cpu.Stream, 'record_event')   # `fully_shard` of torch 2.6 does not run on a CPU

def fit(learn, n=1, **kwargs):
    "`fit` in silence; returns the learner"
    with learn.no_bar(), learn.no_logging(): learn.fit(n, **kwargs)
    return learn

def loaders(x, y, bs=None, valid=2):
    "All of `x` and `y` as training batches of `bs` (None: one batch), in order; some of it again to validate"
    ds = L(zip(x, y))
    return DataLoaders(DataLoader(ds, bs=bs or len(ds)), DataLoader(ds[:valid], bs=valid))

def both_callbacks(stats=None, norm=None):
    "GradStatsCallback and GradNormCallback with these arguments"
    return [GradStatsCallback(**(stats or {})), GradNormCallback(**(norm or {}))]

@contextmanager
def warned():
    "What is warned of"
    res = []
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        yield res
    res += [str(o.message) for o in w if 'shadowing' not in str(o.message) and not issubclass(o.category, (FutureWarning,DeprecationWarning))]

def same_values(a, b):
    "Tensors, arrays and numbers are equal, in lists of lists"
    if isinstance(a, Tensor): return torch.equal(a, b)
    if isinstance(a, np.ndarray): return np.array_equal(a, b)
    return len(a)==len(b) and all(map(same_values, a, b)) if isinstance(a, (list,tuple)) else a==b

# --- pictures

def image_data(n=64, bs=16, size=8, valid=16, c=10):
    "Random pictures in random classes"
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(n+valid,3,size,size, generator=g),torch.randint(c, (n+valid,), generator=g)
    return DataLoaders(*(DataLoader(L(zip(x[s],y[s])), bs=bs) for s in (slice(n),slice(n,None))))

def dropout_convnet():
    return nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(.2),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32,10))
def linear_classifier(): return nn.Sequential(nn.Flatten(), nn.Linear(192,10))

def image_learner(model=dropout_convnet, cbs=None, opt_func=SGD, loss_func=None, cls=Learner, **kw):
    "Four batches of 16 pictures, unless `kw` for `image_data` says otherwise"
    set_seed(0)
    return cls(image_data(**kw), model(), loss_func=loss_func or nn.CrossEntropyLoss(), opt_func=opt_func, cbs=cbs, lr=.01)

# --- vectors of six numbers in three classes

def vector_batches(n=4, bs=8, scale=()):
    "Batches of `bs`, of which those in `scale` (number -> factor) are out of scale"
    x,y = torch.randn(n*bs,6, generator=torch.Generator().manual_seed(0)),torch.arange(n*bs)%3
    for i,factor in dict(scale).items(): x[i*bs:(i+1)*bs] *= factor
    return loaders(x, y, bs)

def seeded_mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6,8), nn.Tanh(), nn.Linear(8,3))

def small_linear():
    "Its gradient grows with its input"
    torch.manual_seed(0)
    return nn.Linear(6,3)

def step_learner(cbs=(), model=None, dls=None, loss=F.cross_entropy, cls=Learner, opt_func=SGD, lr=.1, valid=False, **kwargs):
    "Four batches of 8 vectors; it validates if asked to"
    cbs = [*cbs, *([] if valid else [TrainOnly()])]
    return cls(dls or vector_batches(), model or seeded_mlp(), loss_func=loss, opt_func=opt_func, cbs=cbs, lr=lr, **kwargs)

# --- the same training with and without the callbacks

def vector_data(n=24, seed=0):
    "Random vectors in random classes"
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n,6, generator=g),torch.randint(3, (n,), generator=g)

def vector_learner(make, cbs=(), loss=F.cross_entropy, cls=Learner, opt_func=SGD, bs=8):
    "Three batches of 8 vectors, through the model that `make` makes from seed 0"
    dls = loaders(*vector_data(), bs=bs)
    set_seed(0)
    return cls(dls, make(), loss_func=loss, opt_func=opt_func, lr=.05, cbs=[*cbs, TrainOnly()])

class KeepsLosses(Callback):
    order = 2000
    def before_fit(self): self.losses = []
    def after_loss(self):
        if self.training: self.losses.append(self.learn.loss.detach().clone())

def trained_bits(make, *cbs, n=1, **kw):
    "Losses, weights and random state after a fit"
    learn = fit(vector_learner(make, [*cbs, (seen := KeepsLosses())], **kw), n)
    weights = [p.detach().clone() for p in learn.model.parameters()]
    return learn,[*seen.losses, *weights, torch.get_rng_state()]

def same_tensors(a, b):
    def dense(t): return t.to_dense() if t.layout is not torch.strided else t
    return len(a)==len(b) and all(torch.equal(dense(x), dense(y)) for x,y in zip(a, b))

def trained_alike(make, *cbs, n=1, **kw):
    "Trained with both callbacks, the same bits as without; returns the learner and what was said"
    _,bare = trained_bits(make, *(deepcopy(c) for c in cbs if not isinstance(c, (GradStatsCallback,GradNormCallback))), n=n, **kw)
    ours = [] if any(isinstance(c, GradStatsCallback) for c in cbs) else [GradStatsCallback()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        learn,with_us = trained_bits(make, *ours, GradNormCallback(), *cbs, n=n, **kw)
    assert same_tensors(bare, with_us)
    return learn,[str(w.message) for w in caught if 'fastai_gradstats' in w.filename]

def stats_callback(learn): return next(c for c in learn.cbs if isinstance(c, GradStatsCallback))
def rows_of(learn, kind='output'): return stats_callback(learn).select(kind=kind).df
def row_names(learn, kind='output'): return list(rows_of(learn, kind)['name'].unique())

def tanh_mlp(): return nn.Sequential(nn.Linear(6,8), nn.Tanh(), nn.Linear(8,3))

wrapped_sgd = partial(OptimWrapper, opt=torch.optim.SGD)
