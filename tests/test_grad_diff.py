"Where two runs part: mutants of twin nets against autograd's own gradients; twins that differ by rounding only raise no alarm."
import copy
import pandas as pd, pytest, torch, torch.nn.functional as F
from torch import nn
from fastai_gradstats import GradRecord, compare, grad_diff
from helpers.twins import call_loss, fused_adam, train_twin, twins

# --- one place that is changed

def setting(path, **values):
    "A change of attributes of one module"
    def change(model):
        module = model.get_submodule(path)
        for name,value in values.items(): setattr(module, name, value)
    return change

def times_in_backward(path, factor):
    "What backward passes on at this module is `factor` times as much"
    def change(model): model.get_submodule(path).register_forward_hook(lambda m, i, o: _with_factor(o, factor))
    return change
def _with_factor(o, factor): return tuple(_with_factor(t, factor) for t in o) if isinstance(o, tuple) else factor*o-(factor-1)*o.detach()

def times_in_parameter(path, factor):
    def change(model): model.get_parameter(path).register_hook(lambda g: factor*g)
    return change

def weights_times(path, factor):
    def change(model): model.get_parameter(path).data.mul_(factor)
    return change
def weights_anew(path):
    def change(model):
        g = torch.Generator().manual_seed(99)
        p = model.get_parameter(path)
        p.data.copy_(torch.randn(p.shape, generator=g)*p.std().item())
    return change

def cuts_off(path):
    "A detach() behind this module"
    def change(model): model.get_submodule(path).register_forward_hook(lambda m, i, o: _detached(o))
    return change
def _detached(o): return tuple(map(_detached, o)) if isinstance(o, tuple) else o.detach()
def input_cut_off(path):
    "A detach() ahead of this module, in one of its two branches"
    def change(model): model.get_submodule(path).register_forward_pre_hook(lambda m, args: tuple(o.detach() for o in args))
    return change
def evaluates(path):
    def change(model): model.get_submodule(path).eval()
    return change

def loss_times(factor): return lambda out, y: factor*F.cross_entropy(out, y)
def smoothed(out, y): return F.cross_entropy(out, y, label_smoothing=.1)
def summed(out, y): return F.cross_entropy(out, y, reduction='sum')
def weighted(out, y): return F.cross_entropy(out, y, weight=torch.linspace(.5,1.5,10))
def decayed(out, y, model): return F.cross_entropy(out, y)+.01*sum(p.square().sum() for p in model.parameters())
decayed.of_model = True

# (kind of fault, net, keywords of the faulty twin, the factor where it is one)
mutants = [
    ('loss factor', 'cnn', dict(loss=loss_times(2)), 2), ('loss factor', 'lstm', dict(loss=loss_times(.5)), .5),
    ('loss factor', 'transformer', dict(loss=loss_times(3)), 3), ('loss factor', 'tabular', dict(loss=loss_times(-1)), -1),
    ('sum for mean', 'cnn', dict(loss=summed), 32), ('sum for mean', 'tabular', dict(loss=summed), 32),
    ('accumulation', 'plain_cnn', dict(parts=4, divide=False), 4), ('accumulation', 'lstm', dict(parts=4, divide=False), 4),
    ('accumulation', 'transformer', dict(parts=2, divide=False), 2), ('accumulation', 'tabular', dict(parts=8, divide=False), 8),
    ('factor in backward', 'cnn', dict(change=times_in_backward('blocks.1.conv2', 3)), None),
    ('factor in backward', 'cnn', dict(change=times_in_backward('stem', 1.5)), 1.5),
    ('factor in backward', 'transformer', dict(change=times_in_backward('norm', .25)), .25),
    ('factor in backward', 'transformer', dict(change=times_in_backward('blocks.1.attn.v', 2)), None),
    ('factor in backward', 'lstm', dict(change=times_in_backward('rnn2', 2)), 2),
    ('factor in backward', 'tabular', dict(change=times_in_backward('lin2', 2)), 2),
    ('gradient reversed', 'lstm', dict(change=times_in_backward('hidden', -1)), -1),
    ('gradient reversed', 'tabular', dict(change=times_in_backward('norm1', -1)), -1),
    ('factor of a parameter', 'cnn', dict(change=times_in_parameter('blocks.0.conv1.weight', .1)), .1),
    ('factor of a parameter', 'transformer', dict(change=times_in_parameter('blocks.2.up.weight', 10)), 10),
    ('detach', 'tabular', dict(change=cuts_off('embs.0')), None), ('detach', 'lstm', dict(change=cuts_off('rnn1')), None),
    ('detach', 'transformer', dict(change=input_cut_off('blocks.1.attn')), None), ('detach', 'cnn', dict(change=input_cut_off('blocks.2.conv1')), None),
    ('attention scale', 'transformer', dict(change=setting('blocks.0.attn', scale=1/8)), None),
    ('attention scale', 'transformer', dict(change=setting('blocks.2.attn', scale=1.)), None),
    ('padding mask', 'transformer', dict(change=setting('', masks=False)), None),
    ('padding mask', 'transformer', dict(change=setting('blocks.1.attn', mask_value=-1.)), None),
    ('residual scale', 'cnn', dict(change=setting('blocks.1', scale=1.)), None), ('residual scale', 'transformer', dict(change=setting('blocks.0', scale=.5)), None),
    ('init', 'cnn', dict(change=weights_anew('blocks.1.conv1.weight')), None), ('init', 'lstm', dict(change=weights_times('rnn2.weight_hh_l0', 1.1)), None),
    ('init', 'transformer', dict(change=weights_times('blocks.2.down.weight', .9)), None), ('init', 'tabular', dict(change=weights_anew('lin1.weight')), None),
    ('weight decay in the loss', 'cnn', dict(loss=decayed), None), ('weight decay in the loss', 'tabular', dict(loss=decayed), None),
    ('label smoothing', 'lstm', dict(loss=smoothed), None), ('label smoothing', 'transformer', dict(loss=smoothed), None),
    ('class weights', 'tabular', dict(loss=weighted), None),
    ('activation', 'cnn', dict(change=setting('blocks.1', act=F.gelu)), None), ('activation', 'transformer', dict(change=setting('blocks.0', act=F.relu)), None),
    ('activation', 'lstm', dict(change=setting('', act=F.relu)), None), ('activation', 'tabular', dict(change=setting('', act=F.silu)), None),
    ('eps', 'cnn', dict(change=setting('blocks.0.norm', eps=.1)), None), ('eps', 'transformer', dict(change=setting('blocks.1.norm2', eps=.1)), None),
    ('eps', 'tabular', dict(change=setting('norm2', eps=.1)), None),
    ('evaluation mode', 'cnn', dict(change=evaluates('blocks.1.norm')), None)]

# --- the oracle: autograd's own gradients, whole, in the order in which they came

def whole_gradients(name, seed=0, bs=32, parts=1, divide=True, loss=F.cross_entropy, change=None):
    "name -> gradient of the first step, in float64, in the order in which it was complete; and the weights"
    torch.manual_seed(seed)
    model = twins[name].make()
    g = torch.Generator().manual_seed(seed)
    x,y = twins[name].data(g, 4*bs)[:bs],torch.randint(10, (4*bs,), generator=g)[:bs]
    if change: change(model)
    model.double()
    if x.is_floating_point(): x = x.double()
    found = {}
    def keep(key, grad): found[key] = torch.cat([found[key], grad]) if key in found and key[0]=='output' else grad.clone()
    def listen(m, i, o, n):
        for place,t in enumerate(o for o in flat(o)):
            if t.requires_grad: t.register_hook(lambda grad: keep(('output',n,place), grad))
    for n,m in model.named_modules():
        if next(m.parameters(recurse=False), None) is not None:
            m.register_forward_hook(lambda m, i, o, n=n or '(model)': listen(m, i, o, n))
    for n,p in model.named_parameters(): p.register_post_accumulate_grad_hook(lambda p, n=n: keep(('param',n,0), p.grad))
    weights = {n:p.detach().clone() for n,p in model.named_parameters()}
    for xb,yb in zip(x.chunk(parts), y.chunk(parts)):
        value = call_loss(loss, model, xb, yb)
        (value/parts if divide else value).backward()
    return found,weights

def flat(o): return [t for item in o for t in flat(item)] if isinstance(o, tuple) else [o]

def first_by_autograd(a, b, weights_a, weights_b):
    "The names that may be called first: the tensor that came first of those that differ"
    for n in weights_a:
        if not torch.equal(weights_a[n], weights_b[n]): return [n]
    for key in dict.fromkeys([*a, *b]):
        if key not in a or key not in b: return _alone(a, b)
        size = max(a[key].norm(), b[key].norm())
        if size>1e-14 and (a[key]-b[key]).norm()>1e-4*size: return [key[1]] if key[0]=='output' else _beside(key[1], a)
    return []

def _beside(name, found):
    "The parameters of one module get their gradients at once, in no order"
    module = name.rpartition('.')[0]
    return [n for kind,n,_ in found if kind=='param' and n.rpartition('.')[0]==module]

def _alone(a, b):
    "Of tensors that have a gradient on one side only, the first one by the order of the other"
    longer,shorter = (a,b) if len(a)>len(b) else (b,a)
    return [next(key for key in longer if key not in shorter)[1]]

def found_and_expected(kind, name, kw, factor, seed=0):
    a = train_twin(name, seed, steps=2)
    b = train_twin(name, seed, steps=2, **kw)
    found = grad_diff(a, b)
    plain,faulty = whole_gradients(name, seed),whole_gradients(name, seed, **{k:v for k,v in kw.items()})
    return found,first_by_autograd(plain[0], faulty[0], plain[1], faulty[1])
