"`grad_diff`: mutants of twin nets against autograd's own gradients; twins that differ by rounding only raise no alarm."
import math, time
import numpy as np
import pandas as pd, pytest, torch, torch.nn.functional as F
from torch import nn
from fastai_gradstats import GradRecord, GradRecorder, compare, grad_diff, save_report
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
def weighted(out, y): return F.cross_entropy(out, y, weight=torch.linspace(.5,1.5,10, dtype=out.dtype))
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

def label(o): return '-'.join([o[0].replace(' ', '_'), o[1]])

def is_right(found, expected, factor):
    if found.first not in expected: return False
    return factor is None or found.factor is not None and abs(found.factor/factor-1)<.01

few_mutants = [next(m for m in mutants if m[0]==kind) for kind in dict.fromkeys(m[0] for m in mutants)]

def mutants_found(some, seed=0):
    wrong = []
    for kind,name,kw,factor in some:
        found,expected = found_and_expected(kind, name, kw, factor, seed)
        if not is_right(found, expected, factor): wrong.append(f'{kind} {name}: expected {expected} {factor}, found {found.first} {found.factor}')
    return wrong

def test_one_mutant_of_each_kind():
    "The first tensor is the first by autograd, and the factor is right"
    assert len(few_mutants)>=15 and mutants_found(few_mutants)==[]

@pytest.mark.battery
@pytest.mark.parametrize('seed', [0,1])
def test_all_mutants(seed):
    assert len(mutants)>=40
    wrong = mutants_found(mutants, seed)
    assert len(wrong)<=.05*len(mutants), '\n'.join(wrong)

@pytest.mark.parametrize('name,change,module', [('transformer',setting('blocks.0.attn', scale=1/8),'blocks.0'), ('cnn',setting('blocks.1', scale=1.),'blocks.1'),
                                                ('transformer',setting('blocks.1.attn', mask_value=-1.),'blocks.1')], ids='scale residual mask'.split())
def test_forward_is_searched(name, change, module):
    "Where forward differs all gradients do; the ratio jumps at the place"
    found = grad_diff(train_twin(name, steps=1), train_twin(name, steps=1, change=change))
    assert found.jump and found.jump.startswith(module), found and 'losses differ already' in str(found)

# --- rounding only

def per_tensor_adam(params, **kw): return torch.optim.AdamW(params, foreach=False, **kw)
def fused_attention(model):
    for block in model.blocks: block.attn.fused = True
def channels_last(model): model.to(memory_format=torch.channels_last)

roundings = dict(bf16=dict(half=True), order=dict(shuffle=True), fused=dict(opt=fused_adam), by_tensor=dict(opt=per_tensor_adam), threads=dict(threads=2),
                 split=dict(parts=4), halves=dict(parts=2), double=dict(double=True), attention=dict(change=fused_attention), layout=dict(change=channels_last))
left_out = {('split','cnn'), ('halves','cnn'), ('bf16','lstm')}   # BatchNorm sees another batch; oneDNN has no such LSTM

def rounding_cases():
    for how in roundings:
        for name in twins:
            if (how,name) in left_out: continue
            if how=='attention' and name!='transformer' or how=='layout' and not name.endswith('cnn'): continue
            yield how,name

def alarms(cases, seeds, **kw):
    found = []
    for seed in seeds:
        plain = {name:train_twin(name, seed, **kw) for name in twins}
        for how,name in cases:
            diff = grad_diff(plain[name], train_twin(name, seed, **kw, **roundings[how]))
            if not diff.same: found.append(f'{how} {name} {seed}: {diff}')
    return found

few_roundings = [('bf16','cnn'), ('bf16','tabular'), ('bf16','transformer'), ('order','lstm'), ('fused','transformer'), ('threads','cnn'), ('split','plain_cnn'),
                 ('split','transformer'), ('double','tabular'), ('attention','transformer'), ('layout','cnn')]

def test_rounding_is_no_alarm(): assert alarms(few_roundings, [0], steps=3)==[]

@pytest.mark.battery
@pytest.mark.parametrize('kw', [dict(steps=4), dict(steps=10, lr=1e-2), dict(steps=10, lr=.1, opt=torch.optim.SGD)], ids='adam adam-1e-2 sgd'.split())
def test_no_rounding_is_an_alarm(kw):
    cases = [(how,name) for how,name in rounding_cases() if not ('opt' in kw and 'opt' in roundings[how])]
    assert alarms(cases, [1,5], **kw)==[]

class Squeeze(nn.Module):
    "Channels weighed by a bottleneck of 4 units, whose gradient is small and turns around when one of them is switched"
    def __init__(self, c=8):
        super().__init__()
        self.narrow,self.wide = nn.Conv2d(c,4,1),nn.Conv2d(4,c,1)
    def forward(self, x): return x*torch.sigmoid(self.wide(F.relu(self.narrow(x.mean((2,3), keepdim=True)))))

def squeezed(model):
    for block in model.blocks: block.act = Squeeze()

def test_noise_that_turns_around_is_no_alarm():
    for seed in range(8):
        kw = dict(name='cnn', seed=seed, steps=3, lr=1e-2, change=squeezed)
        found = grad_diff(train_twin(**kw), train_twin(**kw, half=True))
        assert found.same, f'{seed}: {found}'

# --- other steps than the first

class KeepsGradients(torch.optim.AdamW):
    "zero_grad was forgotten"
    def zero_grad(self, set_to_none=True): pass

def test_gradients_that_are_not_cleared():
    "The first step agrees, with it the weights; the second has the sum of two gradients"
    found = grad_diff(train_twin('lstm'), train_twin('lstm', opt=KeepsGradients))
    assert (found.step, found.what)==(1, 'gradients') and found.first in ('head.weight','head.bias')

@pytest.mark.parametrize('name', ['plain_cnn','lstm'])
def test_batches_of_other_sizes_are_other_data(name):
    "Gradients of outputs cannot be compared then, and are not said to agree"
    found = grad_diff(train_twin(name), train_twin(name, bs=16, steps=8))
    assert 'part at (loss)' in found.sentence() and 'agree' not in str(found), str(found)
    assert 'not the same data: 32 samples in a and 16 in b, at step 0' in found.evidence
    assert 'samples' not in str(grad_diff(train_twin(name), train_twin(name, parts=2, divide=False)))

@pytest.mark.parametrize('kw', [dict(opt=lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=.5)), dict(lr=2e-3)], ids='decay lr'.split())
@pytest.mark.parametrize('update_every', [None,1])
def test_optimizers_differ(kw, update_every):
    found = grad_diff(train_twin('transformer', update_every=update_every), train_twin('transformer', update_every=update_every, **kw))
    assert (found.what, found.step)==(('weights',1) if update_every is None else ('updates',0))
    assert 'the optimizers differ' in found.sentence()

def test_settings_that_differ_are_named():
    found = grad_diff(train_twin('lstm'), train_twin('lstm', lr=2e-3))
    assert found.what=='weights' and 'learning rates differ: 0.001 in a, 0.002 in b, at step 0' in str(found) and 'clipping' not in str(found)

def test_clipping_of_one_is_named():
    def train(clip):
        torch.manual_seed(0)
        model = nn.Linear(8, 3)
        opt = torch.optim.SGD(model.parameters(), lr=.1)
        with GradRecorder(model, opt) as rec:
            for i in range(3):
                model(torch.randn(16,8)).square().mean().backward()
                rec.read()
                nn.utils.clip_grad_norm_(model.parameters(), clip)
                opt.step()
                opt.zero_grad()
        return rec.record
    found = grad_diff(train(math.inf), train(1e-3))
    assert found.what=='weights' and 'clipping differs, by what it leaves of the gradient: 1 in a, 0.00' in str(found), str(found)

@pytest.mark.parametrize('factor', [1.002,.995])
def test_factor_near_one_in_backward(factor):
    "The loss has not that factor, though it differs from it by less than 1 %"
    found = grad_diff(train_twin('cnn'), train_twin('cnn', change=times_in_backward('stem', factor)))
    assert found.first.startswith('stem') and found.factor==pytest.approx(factor, rel=1e-4) and 'loss too' not in str(found)

def test_frozen_first_module():
    "Its output has no gradient then, and nothing is detached"
    def freezes(model): model.stem.requires_grad_(False)
    found = grad_diff(train_twin('cnn'), train_twin('cnn', change=freezes))
    assert found.first=='stem' and 'it is frozen there' in found.sentence()

# --- what is given

def test_kinds_of_records(tmp_path):
    "A recorder, a record, a folder, frames and norms alone; and a comparison of two runs"
    a,b = train_twin('tabular'),train_twin('tabular', loss=loss_times(2))
    a.save(tmp_path/'a')
    assert grad_diff(tmp_path/'a', b).factor==pytest.approx(2, rel=1e-5)
    of_frames = grad_diff(a.tensors, b.tensors)
    assert of_frames.first=='head' and 'precision of a run was not recorded' in str(of_frames)
    norms = [GradRecord(steps=r.steps, params=r.by()) for r in (a,b)]
    assert grad_diff(*norms).factor==pytest.approx(2, rel=1e-5) and grad_diff(*norms).first.startswith('head.')
    both = compare({'plain':a, 'doubled':b})
    assert 'doubled is 2 times plain from (loss) on' in grad_diff(both).sentence() and 'doubled is 2 times plain' in both.sentence()
    with pytest.raises(ValueError, match='two records'): grad_diff(a)
    with pytest.raises(ValueError, match='no tensor in common'): grad_diff(a.select(kind='output'), train_twin('lstm').select(kind='output', name='rnn1'))

@pytest.mark.slow
def test_report(tmp_path):
    "A comparison's page says where its two runs part, and draws it"
    page = save_report(compare({'plain':train_twin('tabular'), 'doubled':train_twin('tabular', loss=loss_times(2))}), tmp_path/'page.html').read_text(encoding='utf-8')
    assert 'doubled is 2 times plain from (loss) on' in page and 'Where the two part' in page and 'plot_grad_diff' in page
    none = save_report(compare({'a':train_twin('tabular'), 'b':train_twin('cnn')}), tmp_path/'none.html').read_text(encoding='utf-8')
    assert 'no tensor in common' in none or 'a and b' in none

def test_other_seed_is_said(): assert grad_diff(train_twin('lstm'), train_twin('lstm', seed=1)).what=='weights'

def test_order_of_execution():
    "The order of backward is recorded, and not that of definition: torch's layer names its norms last"
    def train(change=None):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0., batch_first=True)
        if change: change(model)
        opt = torch.optim.SGD(model.parameters(), lr=.1)
        with GradRecorder(model, opt) as rec:
            model(torch.randn(4,5,16)).pow(3).mean().backward()
            opt.step()
        return rec.record
    assert train().facts[0]['backward']==['norm2','linear2','linear1','norm1','self_attn']
    found = grad_diff(train(), train(times_in_backward('linear1', 2)))
    assert found.first in ('linear1.weight','linear1.bias')

def test_many_rows_in_seconds():
    "300 tensors, 10,000 iterations, which is what is kept of more: rows of other steps are not touched"
    n,tensors = 10_000,300
    names = pd.Categorical.from_codes(np.tile(np.arange(tensors, dtype=np.int16), n), [f'block.{i}.weight' for i in range(tensors)])
    step = np.repeat(np.arange(n, dtype=np.int32), tensors)
    frame = pd.DataFrame(dict(fit=np.int32(0), phase=pd.Categorical.from_codes(np.zeros(len(step), np.int8), ['fit','lr_find']), epoch=np.int32(0), iteration=step, step=step,
        kind=pd.Categorical.from_codes(np.ones(len(step), np.int8), ['output','param']), name=names, out=np.int32(0), call=np.int32(0), numel=np.int64(100), max_abs=np.float32(.1),
        mean_abs=np.float32(.1), norm=np.float32(1), mean=np.float32(.01), std=np.float32(.1), zeros=np.int64(0), nonfinite=np.int64(0), above=np.int64(0), skipped=False), copy=False)
    rec = GradRecord(frame)
    start = time.process_time()
    assert grad_diff(rec, rec).same
    assert time.process_time()-start<5
