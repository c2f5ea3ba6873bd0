"Which backward is the loss's: several of them, penalties, gradients that are asked for beside it."
import pytest,torch
import torch.nn.functional as F
from copy import deepcopy
from fastai.basics import *
from torch import nn
from fastai_gradstats import GradNormCallback,GradStatsCallback
from helpers.callbacks import ByRows,TrainOnly
from helpers.loops import CreatesGraph,TwoLosses
from helpers.models import random_vectors
from helpers.oracles import GradSpy,Twin,as_float64,check_against_spy,check_outputs,check_params,check_rows,compare_row,output_grads,owner_names
from helpers.training import (
    both_callbacks, fit, image_learner, linear_classifier, loaders, row_names, rows_of, seeded_mlp, step_learner,
    tanh_mlp, trained_alike, vector_data, vector_learner, wrapped_sgd)

# --- several backwards

def test_two_losses():
    "Two backwards through the same outputs: a row for each, in that order; parameters have one row, the sum."
    learn = image_learner(linear_classifier, [*both_callbacks(), (spy := GradSpy())], cls=TwoLosses, n=16)
    model,(x,y) = deepcopy(learn.model),first(learn.dls.train)
    fit(learn)
    want = [output_grads(model, f, ['1'])['1',0,0] for f in (lambda m: F.cross_entropy(m(x), y), lambda m: m(x).square().mean())]
    for r,g in zip(learn.grad_stats.select(kind='output').df.to_dict('records'), want, strict=True): compare_row(r, g)
    check_params(learn.grad_stats.df, spy, learn.grad_norm.norms)

@pytest.mark.parametrize('cls', (GradStatsCallback,ByRows))
def test_create_graph(cls):
    x,y = random_vectors()
    net = nn.Sequential(nn.Linear(4,60), nn.Tanh(), nn.Linear(60,60), nn.Linear(60,3))
    want = output_grads(net, lambda m: F.cross_entropy(m(x), y), owner_names(net))
    cb,norm,spy = cls(),GradNormCallback(),GradSpy()
    fit(CreatesGraph(loaders(x, y), net, loss_func=F.cross_entropy, opt_func=SGD, cbs=[cb,norm,spy,TrainOnly()]))
    check_rows(cb.df[cb.df['kind']=='output'], want, owner_names(net))
    check_params(cb.df, spy, norm.norms)

class TwiceBackward(Callback):
    "A penalty on the gradient itself"
    def after_loss(self):
        if self.training:
            g = torch.autograd.grad(self.loss_grad, list(self.model.parameters()), create_graph=True)
            self.learn.loss_grad = self.loss_grad + .1*sum(o.square().sum() for o in g)

def test_second_backward():
    """A penalty on the gradient: what `autograd.grad` computes for it on the way is no gradient of the loss and has no row; the rows
    are those of loss and penalty together."""
    def loss(learn, model):
        l = learn.loss_func(model(*learn.xb), *learn.yb)
        return l + .1*sum(o.square().sum() for o in torch.autograd.grad(l, list(model.parameters()), create_graph=True))
    spy,twin = GradSpy(),Twin(loss=loss)
    learn = fit(image_learner(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192,9), nn.Tanh(), nn.Linear(9,10)),
                              [*both_callbacks(), spy, twin, TwiceBackward()]))
    check_against_spy(learn, spy)
    check_outputs(learn.grad_stats.df, twin, ['1','3'])
    assert len(twin.grads)==4

def test_output_kept_over_iterations():
    "A tensor that a module returns again and again has one row an iteration, and no hook of ours in the end"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.m,self.prompt = seeded_mlp(),Prompt()
        def forward(self, x): return self.m(x+self.prompt())
    class Prompt(nn.Module):
        def __init__(self): super().__init__(); self.w,self.kept = nn.Parameter(torch.ones(6)),None
        def forward(self):
            if self.kept is None: self.kept = self.w*2
            return self.kept
    class Keeps(Learner):
        def _backward(self): self.loss_grad.backward(retain_graph=True)
    learn = step_learner(both_callbacks(), model=Net(), cls=Keeps)
    fit(learn)
    d = learn.grad_stats.df
    assert d[(d['kind']=='output')&(d['name']=='prompt')].groupby('iteration').size().tolist()==[1]*4
    assert not learn.model.prompt.kept._backward_hooks

# --- gradients beside the backward

class RetainsGraph(Learner):
    def _backward(self): self.loss_grad.backward(retain_graph=True)

class AsksAside(Callback):
    "Asks for another gradient at an event"
    def __init__(self, event, how, order=0):
        self.how,self.order = how,order
        setattr(self, event, self.f)
    def f(self):
        if self.training: self.how(self.learn)

def hessian(learn):
    g, = torch.autograd.grad(learn.pred.square().sum()*1e3, learn.model[0].weight, create_graph=True)
    torch.autograd.grad(g.square().sum(), learn.model[2].weight, retain_graph=True)
def per_task(learn):
    for i in range(3): torch.autograd.grad(learn.pred[:,i].sum()*1e3, list(learn.model.parameters()), retain_graph=True)
def of_input(learn):
    learn.pred.sum().backward(inputs=[learn.xb[0].requires_grad_()], retain_graph=True) if learn.xb[0].requires_grad else None

@pytest.mark.parametrize('how', (hessian,per_task))
@pytest.mark.parametrize('event,order',
                         (('after_loss',0), ('before_backward',-20), ('before_backward',20), ('after_backward',-20),
                          ('after_backward',20), ('before_step',0), ('before_step',20), ('after_step',0)))
def test_gradients_beside_the_backward(event, order, how):
    "They leave no row: the record is that of the run without them."
    if event=='after_step' and how is hessian: how = lambda l: torch.autograd.grad(l.pred.sum()*1e3, l.pred, retain_graph=True)
    if event=='after_step' and how is per_task: return   # weights have moved: torch itself raises
    learn,said = trained_alike(tanh_mlp, AsksAside(event, how, order), cls=RetainsGraph)
    plain,_ = trained_alike(tanh_mlp)
    a,b = rows_of(learn),rows_of(plain)
    assert said==[] and a['norm'].tolist()==b['norm'].tolist() and a['call'].tolist()==b['call'].tolist()

class PenaltyInBackward(Learner):
    "WGAN-GP: a gradient's gradient is part of the loss"
    def _backward(self):
        x = self.xb[0].detach().requires_grad_()
        g, = torch.autograd.grad(self.model(x).sum(), x, create_graph=True)
        (self.loss_grad+g.square().mean()).backward()

def test_gradient_penalty():
    "Rows of the second forward are the derivative of loss and penalty with respect to that output."
    learn,said = trained_alike(tanh_mlp, cls=PenaltyInBackward)
    set_seed(0)
    m,(x,y) = vector_learner(tanh_mlp).model,vector_data()
    x,y = x[:8].clone(),y[:8]
    first = m[0](x)
    loss = F.cross_entropy(m[2](first.tanh()), y)
    z = x.clone().requires_grad_()
    second = m[0](z)
    g, = torch.autograd.grad(m[2](second.tanh()).sum(), z, create_graph=True)
    want = torch.autograd.grad(loss+g.square().mean(), [first,second])
    d = rows_of(learn).query("iteration==0 and name=='0'").to_dict('records')
    assert said==[] and len(d)==2
    for r,g in zip(d, want): compare_row(r, as_float64(g))

class Inputs(Learner):
    def _backward(self): self.loss_grad.backward(inputs=list(self.model.parameters()))
class InputsOfHead(Learner):
    def _backward(self): self.loss_grad.backward(inputs=[self.model[2].weight])
class ByHand(Learner):
    "Per-task gradients that somebody combines"
    def _backward(self):
        ps = list(self.model.parameters())
        for p,g in zip(ps, torch.autograd.grad(self.loss_grad, ps)): p.grad = g.clone()

def test_backward_of_some_parameters():
    "`backward(inputs=...)` trains those parameters, and its rows are the plain run's."
    plain,_ = trained_alike(tanh_mlp)
    assert rows_of(trained_alike(tanh_mlp, cls=Inputs)[0])['norm'].tolist()==rows_of(plain)['norm'].tolist()
    learn,_ = trained_alike(tanh_mlp, cls=InputsOfHead, opt_func=wrapped_sgd)
    a,b = (rows_of(l).query("iteration==0 and name=='2'")['norm'].tolist() for l in (learn,plain))
    assert a==b

def test_gradients_set_by_hand():
    "No backward at all: no output rows, one sentence, parameters right."
    learn,said = trained_alike(tanh_mlp, (spy := GradSpy()), cls=ByHand, n=2)
    assert row_names(learn)==[] and len(said)==1 and 'autograd.grad' in said[0]
    check_params(learn.grad_stats.df, spy, learn.grad_norm.norms)
