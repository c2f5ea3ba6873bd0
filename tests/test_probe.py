"Gradients along rays against theory; what is probed is left as it was."
import random
import numpy as np,pytest,torch
from torch import nn
from fastai.optimizer import Adam
from fastai_gradstats import digits_learner,grad_along_ray,per_sample_norms
from helpers.training import same_values

FAR = np.geomspace(30, 300, 5)
def kaiming_net(L):
    "Kaiming's weights: PyTorch's smaller ones leave the softmax of a single layer unsaturated up to a scale of 50"
    torch.manual_seed(0)
    ls = [nn.Linear(64 if not i else 32, 10 if i==L-1 else 32, bias=False) for i in range(L)]
    for l in ls: nn.init.kaiming_normal_(l.weight)
    return nn.Sequential(nn.Flatten(), *(o for l in ls for o in (l,nn.ReLU())))[:-1]
def mean_squared_error(p, y): return nn.functional.mse_loss(p, nn.functional.one_hot(y, 10).float())
def slopes_far_out(m, **kw): return grad_along_ray(digits_learner(m, data={}, **kw), FAR)['slope']

@pytest.mark.parametrize('L', [1,2,3,4,6])
def test_cross_entropy(L): np.testing.assert_allclose(slopes_far_out(kaiming_net(L)), L-1, atol=.02)

@pytest.mark.parametrize('L', [1,3])
def test_mse(L): np.testing.assert_allclose(slopes_far_out(kaiming_net(L), loss_func=mean_squared_error), 2*L-1, atol=.02)

def learner_bits(learn):
    return [t.clone() for t in learn.model.state_dict().values()],[None if p.grad is None else p.grad.clone() for p in learn.model.parameters()], \
        [m.training for m in learn.model.modules()],torch.get_rng_state(),np.random.get_state()[1].copy(),random.getstate(),learn.dls.train.rng.getstate()

@pytest.mark.parametrize('model', ['convnet','resnet18'])
@pytest.mark.parametrize('stop', [None,ZeroDivisionError,KeyboardInterrupt])
def test_untouched(model, stop):
    learn,n = digits_learner(model, data=dict(bs=8)|(dict(size=16, channels=3) if model=='resnet18' else {})),0
    x,y = learn.dls.one_batch()
    learn.loss_func(learn.model(x), y).backward()
    learn.model.eval()
    def loss(p, t):
        nonlocal n
        n += 1
        if stop and n==2: raise stop('now')
        return nn.functional.cross_entropy(p, t)
    learn.loss_func,before = loss,learner_bits(learn)
    if stop:
        with pytest.raises(stop): grad_along_ray(learn, [1,2,3])
    else: assert not np.isfinite(grad_along_ray(learn, [1,1e40])['loss']).all()
    assert n and same_values(before, learner_bits(learn))

def test_batchnorm():
    "Weights in front of BatchNorm: -1"
    conv = digits_learner(cbs=[])
    np.testing.assert_allclose(grad_along_ray(conv, FAR, params=r'\.0\.weight$')['slope'], -1, atol=.02)

def test_trained_collapses():
    "A net that has every sample right: exactly 0 far out"
    learn = digits_learner(kaiming_net(2), data={})
    with learn.no_bar(), learn.no_logging(): learn.fit(15, .01)
    b = learn.dls.train.one_batch()
    assert (learn.model(b[0]).argmax(1)==b[1]).all()
    ray = grad_along_ray(learn, [1,300], batch=b)
    assert ray['norm'].iloc[0]>0 and ray['norm'].iloc[1]==0

def test_whole_bn_net():
    "All parameters at once, BatchNorm's own and the last layer: +1"
    np.testing.assert_allclose(grad_along_ray(digits_learner(cbs=[]), FAR)['slope'], 1, atol=.02)

def autograd_grads(learn, b):
    "Each parameter's gradient of the mean loss on `b`, by autograd"
    return torch.autograd.grad(learn.loss_func(learn.model(b[0]), b[1]), list(learn.model.parameters()))
def length_of(ts): return torch.cat([t.flatten() for t in ts]).double().norm().item()

def test_directions():
    "'gradient' goes uphill, as steeply as |g| for a step as long as the weights; far out in a 'random' direction the power is L-1"
    learn = digits_learner(kaiming_net(3), data={})
    b = learn.dls.one_batch()
    down,up = grad_along_ray(learn, [-1e-3,1e-3], direction='gradient', batch=b)['loss']
    np.testing.assert_allclose((up-down)/2e-3, length_of(autograd_grads(learn, b))*length_of(learn.model.parameters()), rtol=.01)
    np.testing.assert_allclose(grad_along_ray(learn, FAR*10, direction='random', batch=b)['slope'], 2, atol=.02)

class MoodyLinear(nn.Module):
    "Branches on a value, which `vmap` refuses"
    def __init__(self): super().__init__(); self.lin = nn.Linear(64, 10)
    def forward(self, x):
        x = self.lin(x.flatten(1))
        return x*2 if x.sum().item()>0 else x

def single_grads(learn, b, n):
    "(norms of the gradients of single samples, norm of their mean) by a loop over autograd"
    gs = [autograd_grads(learn, (b[0][i:i+1], b[1][i:i+1])) for i in range(n)]
    return [length_of(g) for g in gs],length_of([torch.stack(o).mean(0) for o in zip(*gs)])

@pytest.mark.parametrize('model,how', [(MoodyLinear(),'loop'),('convnet','torch.func.vmap')])
def test_per_sample(model, how):
    "A loop where vmap refuses; BatchNorm with its running statistics, which stay as they are"
    learn = digits_learner(model, data={}, cbs=[])
    if how!='loop':
        with torch.no_grad(): learn.model(learn.dls.one_batch()[0])   # running statistics that are not 0 and 1
    b = learn.dls.one_batch()
    before = learner_bits(learn)
    got = per_sample_norms(learn, 8, batch=b)
    assert same_values(before, learner_bits(learn)) and got.attrs['how'].startswith(how)
    want,mean = single_grads(learn if how=='loop' else (learn.model.eval(), learn)[1], b, 8)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(got.attrs['mean_norm'], mean, rtol=1e-5)

def test_optimizer_untouched():
    "Adam's averages and step counts are where they were"
    learn = digits_learner(kaiming_net(2), data={}, opt_func=Adam)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
    state = lambda: [(k, v.clone() if isinstance(v, torch.Tensor) else v) for p in learn.model.parameters() for k,v in learn.opt.state[p].items()]
    before = state()
    grad_along_ray(learn, [1,2], direction='gradient')
    per_sample_norms(learn, 4)
    assert len(before)>=6 and same_values(before, state())
