"""Outputs that are views, changed in place by what comes next: autograd's numbers where there is one right answer, else no row and a
warning; training is never touched."""
import gc,warnings,weakref
import pytest,torch
import torch.nn.functional as F
from fastai.basics import *
from torch import nn
from fastai_gradstats import GradNormCallback,GradStatsCallback
from helpers.callbacks import TrainOnly
from helpers.models import FunctionNet,FunctionWithWeight,tensor_leaves
from helpers.oracles import check_rows,output_grads
from helpers.training import fit,loaders

def squares_loss(o, y): return sum((i+1)*t.square().sum() for i,t in enumerate(tensor_leaves(o)))

def run_batch(net, x, names=('m',), cbs=True):
    "One training batch: the frame, what was said, the weights; and autograd's gradients of the outputs of `names`"
    want = output_grads(net, lambda m: squares_loss(m(x), None), names)
    cb = GradStatsCallback('output', modules=[net.get_submodule(n) for n in names])
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        fit(Learner(loaders(x, torch.zeros(len(x))), net, loss_func=squares_loss, opt_func=SGD, lr=1e-3, cbs=[*([cb] if cbs else []),TrainOnly()]))
    return cb.df,[str(o.message) for o in w if 'changed in place' in str(o.message)],[p.detach().clone() for p in net.parameters()],want

rows_shape,picture_shape = (2,5,8),(2,8,6,6)
fresh_views = dict(
    linear=(lambda: nn.Linear(8,8), rows_shape),
    one=(lambda: nn.Linear(6,6), picture_shape),
    instance_norm=(lambda: nn.InstanceNorm2d(8, affine=True), picture_shape),
    instance_norm1=(lambda: nn.InstanceNorm1d(5, affine=True), rows_shape),
    lstm=(lambda: nn.LSTM(8,4, 2, batch_first=True, bidirectional=True), rows_shape),
    proj=(lambda: nn.LSTM(8,9, batch_first=True, proj_size=8), rows_shape),
    gru=(lambda: nn.GRU(8,8, batch_first=True), rows_shape),
    rnn=(lambda: nn.RNN(8,8, batch_first=True), rows_shape),
    attention=(lambda: nn.MultiheadAttention(8,2, batch_first=True), rows_shape),
    seq_first=(lambda: nn.MultiheadAttention(8,2), rows_shape))

@pytest.mark.parametrize('name', fresh_views)
def test_fresh(name):
    "torch's modules whose view is of a tensor of their own: used, then changed in place in three ways, and every output of the module in the loss."
    make,shape = fresh_views[name]
    def f(s, x):
        o = s.m(x,x,x) if isinstance(s.m, nn.MultiheadAttention) else s.m(x)
        more = tensor_leaves(o)[1:] if not isinstance(o, Tensor) else []
        o = o if isinstance(o, Tensor) else o[0]
        early = o.sum()   # keeps nothing of `o`
        o += x
        o[:,0] *= 2
        F.relu(o, inplace=True)
        return [early, s.h(o), *more]
    torch.manual_seed(0)
    net = FunctionNet(f, m=make(), h=nn.Linear(shape[-1],3))
    x = torch.randn(shape)
    df,said,_,want = run_batch(net, x)
    check_rows(df, want, ['m'])
    assert said==[] and len(df)>=1

class Sliced(nn.Linear):
    "Its class says Linear, its output is part of one"
    def forward(self, x): return super().forward(x)[:,1:]

other_views = dict(
    permute=lambda: FunctionNet(lambda s,x: s.n(x.transpose(1,2)).transpose(1,2), n=nn.LayerNorm(5)),
    sliced=lambda: Sliced(8,8),
    transposed=lambda: FunctionWithWeight(lambda w,x: (x*w).transpose(1,2), 8),
    flat=lambda: nn.Flatten(1,2),
    unflat=lambda: nn.Unflatten(2, (2,4)),
    identity=nn.Identity,
    block=lambda: nn.Sequential(nn.Linear(8,8), nn.Dropout(0.)),
    pool=lambda: nn.AdaptiveAvgPool1d(4))

@pytest.mark.parametrize('change', ('none','early','late'))
@pytest.mark.parametrize('name', other_views)
def test_views(name, change):
    """Other views: right while nobody changes them. Changed, there is no row, also not one of the uses before the change, and a
    warning; what else is recorded is right, and weights are those of the run without us."""
    def f(s, x):
        o = s.m(s.l(x))
        early = o.sum()*3 if change=='early' else None
        if change!='none': o += 1
        return [o.cos(), *([early] if early is not None else [])]
    def net():
        torch.manual_seed(0)
        return FunctionNet(f, l=nn.Linear(8,8), m=other_views[name]())
    x = torch.randn(rows_shape)
    names = ['l','m']
    (df,said,w,want),(_,_,w0,_) = (run_batch(net(), x, names, cbs=c) for c in (True,False))
    assert all(map(torch.equal, w, w0))
    if change!='none': want = {k:g for k,g in want.items() if k[0]!='m'}
    check_rows(df, want, names)
    assert len(said)==(change!='none') and all(repr('m') in s for s in said)

class CountsOutputs(Callback):
    "How many outputs of earlier batches are still there"
    def before_fit(self): self.outs,self.counts,self.hooks = [],[],[m.register_forward_hook(self.hook) for m in self.model.modules()]
    def hook(self, m, i, o): self.outs += [weakref.ref(t if t._base is None else t._base) for t in tensor_leaves([o])]
    def before_batch(self): self.counts.append(sum(r() is not None for r in self.outs))
    def after_fit(self):
        for h in self.hooks: h.remove()

def test_outputs_are_not_kept():
    "With our hooks, outputs of the last batch go when they would go without, with Python's garbage collector off."
    def go(cbs):
        net = nn.Sequential(Sliced(8,8), nn.LayerNorm(8), FunctionNet(lambda s,x: (s.l(x)[0], x), l=nn.LSTM(8,8, batch_first=True)),
                            FunctionNet(lambda s,x: x[0]), nn.Linear(8,1))
        learn = Learner(loaders(torch.randn(12,5,8), torch.zeros(12), 2), net, loss_func=lambda o,y: o.square().mean(),
                        opt_func=SGD, cbs=[*cbs,(a := CountsOutputs()),TrainOnly()])
        fit(learn)
        return a.counts
    gc.collect()
    gc.disable()
    try: assert go([])==go([GradStatsCallback(), GradNormCallback()])
    finally: gc.enable()
