"A verdict: sick runs of a new user are found with their cause, healthy ones of all kinds get nothing above a note, and what could not be judged is said."
import math
from contextlib import nullcontext
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from fastai_gradstats import GradRecord, GradRecorder, diagnose
from helpers.records import calm_at,calm_steps
from helpers.twins import Block

# --- a plain loop over digits

def pixels():
    d = load_digits()
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(len(d.target), generator=g)[:1408]
    return torch.tensor(d.images/8-1, dtype=torch.float32)[order,None],torch.tensor(d.target)[order]

def train_digits(make, opt=torch.optim.SGD, lr=.1, epochs=3, bs=64, loss=F.cross_entropy, target=lambda y: y, parts=1, clip=None, half=False, each_step=None, update_every=5, ready=None, **kw):
    "The record of a training; `each_step(i, model, opt)` may act before a step's batch"
    torch.manual_seed(0)
    xs,ys = pixels()
    ys = target(ys)
    model = make()
    params = [p for p in model.parameters() if p.requires_grad]
    opt = opt(params, lr=lr, **kw)
    with GradRecorder(model, opt, update_every=update_every) as rec:
        for i in range(epochs*len(xs)//bs):
            if each_step: each_step(i, model, opt)
            rows = torch.arange(i*bs, (i+1)*bs)%len(xs)
            for part in rows.chunk(parts):
                with torch.autocast('cpu', torch.bfloat16) if half else nullcontext(): value = loss(model(xs[part]), ys[part])
                rec.loss(value)
                (value/parts).backward()
            rec.read()
            if clip: nn.utils.clip_grad_norm_(params, clip)
            opt.step()
            opt.zero_grad()
    return rec.record

def flat_mlp(act=nn.ReLU, norm=None, depth=2, n=64, dropout=0.):
    def make():
        layers = [nn.Flatten()]
        for i in range(depth): layers += [nn.Linear(64 if i==0 else n, n), *([norm(n)] if norm else []), act(), *([nn.Dropout(dropout)] if dropout else [])]
        return nn.Sequential(*layers, nn.Linear(n, 10))
    return make

def convs(norm=lambda c: nn.Identity(), act=nn.ReLU, pool=False):
    def block(i, o): return [nn.Conv2d(i, o, 3, 1 if pool else 2, 1), norm(o), act(), *([nn.MaxPool2d(2)] if pool else [])]
    return lambda: nn.Sequential(*block(1,16), *block(16,32), nn.Flatten(), nn.Linear(128,10))

class DigitSequence(nn.Module):
    "Rows of a digit as a sequence"
    def __init__(self, body, d=32):
        super().__init__()
        self.inp,self.body,self.out = nn.Linear(8,d),body(d),nn.Linear(d,10)
    def forward(self, x):
        x = self.body(self.inp(x[:,0]))
        return self.out((x[0] if isinstance(x, tuple) else x)[:,-1])

class OwnBlocks(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.blocks = nn.ModuleList(Block(d,4) for _ in range(2))
    def forward(self, x):
        for block in self.blocks: x = block(x, torch.zeros(x.shape[:2], dtype=torch.bool))
        return x

class ReZero(nn.Module):
    "Residual blocks behind gates that begin at 0"
    def __init__(self, n=64, depth=4):
        super().__init__()
        self.inp,self.layers,self.out = nn.Linear(64,n),nn.ModuleList(nn.Linear(n,n) for _ in range(depth)),nn.Linear(n,10)
        self.gates = nn.Parameter(torch.zeros(depth))
    def forward(self, x):
        x = self.inp(x.flatten(1))
        for gate,layer in zip(self.gates, self.layers): x = x+gate*F.gelu(layer(x))
        return self.out(x)

class LoRALinear(nn.Module):
    "A frozen layer and an update of low rank, of which one factor begins at 0"
    def __init__(self, i, o, rank=4):
        super().__init__()
        self.base = nn.Linear(i,o).requires_grad_(False)
        self.a,self.b = nn.Parameter(torch.randn(i,rank)/i**.5),nn.Parameter(torch.zeros(rank,o))
    def forward(self, x): return self.base(x)+x@self.a@self.b
def lora(): return nn.Sequential(nn.Flatten(), LoRALinear(64,64), nn.ReLU(), LoRALinear(64,64), nn.ReLU(), LoRALinear(64,10))

class Experts(nn.Module):
    "Each sample goes to the expert that the router prefers; rare ones get tokens in few batches"
    def __init__(self, n=4, d=32, sure=1.):
        super().__init__()
        self.inp,self.router = nn.Linear(64,d),nn.Linear(d,n)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(d,d), nn.ReLU(), nn.Linear(d,d)) for _ in range(n))
        self.mid,self.out = nn.Linear(d,d),nn.Linear(d,10)
        self.sure = sure
    def forward(self, x):
        x = F.gelu(self.inp(x.flatten(1)))
        p = (self.sure*self.router(x)).softmax(-1)
        top,which = p.max(-1)
        res = torch.zeros_like(x)
        for i,expert in enumerate(self.experts):
            rows = (which==i).nonzero()[:,0]
            if len(rows): res = res.index_add(0, rows, expert(x[rows])*top[rows,None])
        return self.out(F.gelu(self.mid(x+res)))

class Tiny(nn.Module):
    "What one layer says counts for nearly nothing"
    def __init__(self, scale):
        super().__init__()
        self.inp,self.router,self.mid,self.out = nn.Linear(64,64),nn.Linear(64,64),nn.Linear(64,64),nn.Linear(64,10)
        self.scale = scale
    def forward(self, x):
        x = F.gelu(self.inp(x.flatten(1)))
        return self.out(F.gelu(self.mid(x+self.scale*self.router(x))))

class TwoTasks(nn.Module):
    "A head for each of two tasks, in turn"
    def __init__(self):
        super().__init__()
        self.body,self.digit,self.parity = nn.Linear(64,64),nn.Linear(64,10),nn.Linear(64,10)
        self.n = 0
    def forward(self, x):
        self.n += 1
        return (self.digit if self.n%4 else self.parity)(F.relu(self.body(x.flatten(1))))

class AutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc,self.dec = nn.Sequential(nn.Linear(64,32), nn.GELU(), nn.Linear(32,16)),nn.Sequential(nn.Linear(16,32), nn.GELU(), nn.Linear(32,64))
    def forward(self, x): return self.dec(self.enc(x.flatten(1)))-x.flatten(1)

class Modulated(nn.Module):
    "Blocks whose modulation begins at 0, and a head that does, as in DiT: all but the head waits for a step"
    def __init__(self, n=32, depth=3):
        super().__init__()
        self.inp = nn.Linear(64,n)
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(shift=nn.Linear(n,3*n), a=nn.Linear(n,n), b=nn.Linear(n,n))) for _ in range(depth))
        self.out = nn.Linear(n,10)
        for layer in (*(block['shift'] for block in self.blocks), self.out): zeros(layer)
    def forward(self, x):
        x = cond = self.inp(x.flatten(1))
        for block in self.blocks:
            shift,scale,gate = block['shift'](F.silu(cond)).chunk(3, -1)
            x = x+gate*block['b'](F.gelu(block['a'](x*(1+scale)+shift)))
        return self.out(x)

class RowClasses(nn.Module):
    "A class of 10 for each of 8 rows: positions as in a sequence"
    def __init__(self, bias=True, std=None):
        super().__init__()
        self.inp,self.out = nn.Linear(8,32),nn.Linear(32,10,bias=bias)
        if std: nn.init.normal_(self.out.weight, 0, std)
    def forward(self, x): return self.out(F.relu(self.inp(x[:,0]))).transpose(1,2)

def zeros(*layers):
    for p in (p for layer in layers for p in layer.parameters()): nn.init.zeros_(p)
def zero_head():
    model = flat_mlp()()
    zeros(model[-1])
    return model
def zero_regression():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64,10))
    zeros(model)
    return model
def zero_probe():
    model = zero_head()
    for layer in model[:-1]: layer.requires_grad_(False)
    return model
def lora_with_head():
    "More parameters are trained than frozen"
    return nn.Sequential(*lora()[:-1], zero_head()[-1])
def all_rows(y): return y[:,None].expand(-1, 8)

def odd_or_even(y): return (y%2).float()[:,None]
def one_hot(y): return F.one_hot(y, 10).float()
def lr_warms_up(i, model, opt): opt.param_groups[0]['lr'] = .1*min(1, i/20)
def unfreeze_later(i, model, opt):
    if i==33: model[1].requires_grad_(True)
def frozen_body():
    model = flat_mlp(depth=3)()
    model[1].requires_grad_(False)
    model[3].requires_grad_(False)
    return model
def tail(n): return lambda: nn.Sequential(*flat_mlp()()[:-1], nn.Linear(64,n))
def smooth(out, y): return F.cross_entropy(out, y, label_smoothing=.1)

usual_adam = dict(opt=torch.optim.Adam, lr=3e-3)
healthy = dict(
    mlp=(flat_mlp(), {}), mlp_low=(flat_mlp(), dict(lr=.02)), mlp_adam=(flat_mlp(), usual_adam), mlp_rms=(flat_mlp(), dict(opt=torch.optim.RMSprop, lr=1e-3)),
    mlp_momentum=(flat_mlp(), dict(lr=.02, momentum=.9)), mlp_tanh=(flat_mlp(nn.Tanh), {}), mlp_deep=(flat_mlp(nn.GELU, depth=5), usual_adam), mlp_dropout=(flat_mlp(dropout=.3), usual_adam),
    mlp_batchnorm=(flat_mlp(norm=nn.BatchNorm1d), {}), mlp_layernorm=(flat_mlp(norm=nn.LayerNorm), usual_adam), small_batches=(flat_mlp(), dict(lr=.02, bs=4, epochs=1)),
    convs=(convs(), {}), convs_batchnorm=(convs(nn.BatchNorm2d), {}), convs_batchnorm_adam=(convs(nn.BatchNorm2d), usual_adam), convs_groupnorm=(convs(lambda c: nn.GroupNorm(4,c)), usual_adam),
    convs_pooled=(convs(pool=True), usual_adam), convs_silu=(convs(act=nn.SiLU), usual_adam),
    lstm=(lambda: DigitSequence(lambda d: nn.LSTM(d,d,batch_first=True)), dict(opt=torch.optim.Adam, lr=.01)), gru=(lambda: DigitSequence(lambda d: nn.GRU(d,d,batch_first=True)), dict(opt=torch.optim.Adam, lr=.01)),
    transformer=(lambda: DigitSequence(lambda d: nn.TransformerEncoder(nn.TransformerEncoderLayer(d,4,64,dropout=.1,batch_first=True), 2)), dict(opt=torch.optim.AdamW, lr=1e-3)),
    own_attention=(lambda: DigitSequence(OwnBlocks), dict(opt=torch.optim.AdamW, lr=1e-3)), rezero=(ReZero, usual_adam), lora=(lora, dict(opt=torch.optim.Adam, lr=.01)),
    experts=(Experts, usual_adam), two_tasks=(TwoTasks, usual_adam), autoencoder=(AutoEncoder, dict(**usual_adam, loss=lambda out, y: out.square().mean())),
    regression=(tail(1), dict(lr=.01, loss=F.mse_loss, target=lambda y: y.float()[:,None])), binary=(tail(1), dict(loss=F.binary_cross_entropy_with_logits, target=odd_or_even)),
    multi_label=(flat_mlp(nn.GELU), dict(opt=torch.optim.Adam, lr=1e-3, loss=F.binary_cross_entropy_with_logits, target=one_hot)), smoothed=(flat_mlp(), dict(loss=smooth)),
    bf16=(flat_mlp(), dict(half=True)), bf16_convs=(convs(nn.BatchNorm2d), dict(half=True)), accumulated=(flat_mlp(), dict(parts=4)), clipped=(flat_mlp(), dict(clip=.5)),
    frozen_body=(frozen_body, {}), warm_up=(flat_mlp(), dict(each_step=lr_warms_up)), decayed=(flat_mlp(), dict(opt=torch.optim.AdamW, lr=3e-3, weight_decay=.1)),
    longer=(flat_mlp(), dict(epochs=8)),
    zero_head=(zero_head, {}), zero_regression=(zero_regression, {}), zero_probe=(zero_probe, {}), modulated=(Modulated, usual_adam), lora_with_head=(lora_with_head, dict(opt=torch.optim.Adam, lr=.01)),
    rows=(RowClasses, dict(target=all_rows, **usual_adam)), rows_without_bias=(lambda: RowClasses(bias=False), dict(target=all_rows, **usual_adam)))
few_healthy = 'zero_head zero_regression zero_probe modulated lora_with_head rows rows_without_bias mlp convs_batchnorm lstm own_attention lora experts two_tasks regression bf16_convs frozen_body'.split()

def severe(found): return found[found['severity'].isin(['error','warning'])]

def assert_healthy(name):
    make,kw = healthy[name]
    found = diagnose(train_digits(make, **kw))
    assert not len(severe(found)), str(found)
    assert found.verdict.split(' ')[0]!='0' and 'nothing wrong found' in str(found).splitlines()[0]

@pytest.mark.parametrize('name', few_healthy)
def test_healthy(name): assert_healthy(name)

@pytest.mark.battery
@pytest.mark.parametrize('name', [n for n in healthy if n not in few_healthy])
def test_more_healthy(name):
    assert len(healthy)>=30
    assert_healthy(name)

def test_gan_is_not_frozen():
    "Two networks in one module that take turns, each frozen while the other learns"
    torch.manual_seed(0)
    nets = nn.ModuleDict(dict(g=nn.Sequential(nn.Linear(8,32), nn.ReLU(), nn.Linear(32,64)), d=nn.Sequential(nn.Linear(64,32), nn.LeakyReLU(.2), nn.Linear(32,1))))
    opts = {n:torch.optim.Adam(nets[n].parameters(), lr=1e-3) for n in nets}
    xs,_ = pixels()
    with GradRecorder(nets, list(opts.values())) as rec:
        for i in range(60):
            which = 'd' if i%2 else 'g'
            for n in nets: nets[n].requires_grad_(n==which)
            fake = nets['g'](torch.randn(32,8))
            logits = nets['d'](fake) if which=='g' else nets['d'](torch.cat([fake, xs[i*20:i*20+32].flatten(1)]))
            y = torch.ones(32,1) if which=='g' else torch.cat([torch.zeros(32,1), torch.ones(32,1)])
            loss = F.binary_cross_entropy_with_logits(logits, y)
            rec.loss(loss)
            loss.backward()
            opts[which].step()
            nets.zero_grad()
    found = diagnose(rec)
    assert not len(severe(found)) and 'frozen' not in set(found['rule'][found['severity']!='not checked']), str(found)
    assert 'part_time' in set(found['rule'])

class CutOff(nn.Module):
    "The first layer is out of it from a forward on: detached, or dead"
    def __init__(self, how, after=30):
        super().__init__()
        self.first,self.last = nn.Linear(8,16),nn.Linear(16,1)
        self.how,self.after = how,after
        self.calls = 0
    def forward(self, x):
        x = self.first(x)
        self.calls += 1
        if self.calls>self.after: x = self.how(x)
        return self.last(F.relu(x))

@pytest.mark.parametrize('set_to_none', [True, False])
@pytest.mark.parametrize('how,rule', [(torch.detach, 'unused'), (lambda x: x-100, 'dead_units')], ids=['detached','dead'])
def test_a_layer_that_is_cut_off_in_mid_run(how, rule, set_to_none):
    "Detached is not dead: its output has no gradient, where that of a dead layer is 0"
    torch.manual_seed(0)
    net = CutOff(how)
    opt = torch.optim.SGD(net.parameters(), lr=.01)
    with GradRecorder(net, opt) as rec:
        for _ in range(60):
            rec.loss(loss := (net(torch.randn(16,8))-1).square().mean())
            loss.backward()
            opt.step()
            opt.zero_grad(set_to_none=set_to_none)
    found = diagnose(rec)
    about = found[found['rule'].isin(['unused','dead_units','part_time'])&(found['severity']!='not checked')]
    assert about['rule'].tolist()==[rule], str(found)
    if rule=='unused':
        assert found.tensors('unused')==['first.weight','first.bias']
        assert about['severity'].item()=='note' and 'after iteration 29' in about['evidence'].item() and 'detach()' in about['try'].item()

# --- the sicknesses of a new user, and others

def convs_of_std(std):
    def make():
        model = convs()()
        for p in model.parameters():
            if p.dim()>1: nn.init.normal_(p, 0, std)
        return model
    return make

def the_warning(found, rule):
    rows = found[(found['rule']==rule)&found['severity'].isin(['error','warning'])]
    assert len(rows)==1, str(found)
    return rows.iloc[0]

@pytest.mark.parametrize('std', [10.,1.])
def test_large_init(std):
    found = diagnose(train_digits(convs_of_std(std), torch.optim.Adam, 1e-3))
    assert the_warning(found, 'first_loss')['evidence'].endswith('guessing all 10 classes with equal probability gives 2.3') and not found.ok

@pytest.mark.parametrize('bias', [True,False])
def test_large_init_of_sequences(bias):
    "Classes are told from positions: 80 numbers a sample are 10 classes of 8 rows, with a bias or without"
    found = diagnose(train_digits(lambda: RowClasses(bias, std=5.), torch.optim.Adam, 1e-3, target=all_rows, epochs=1))
    assert the_warning(found, 'first_loss')['evidence'].endswith('guessing all 10 classes with equal probability gives 2.3') and not found.ok

def test_sum_over_positions_is_not_judged():
    "A sum of 8 losses is 8 times the loss of a guess, and no sign of a large init"
    found = diagnose(train_digits(RowClasses, target=all_rows, epochs=1, lr=.01, loss=lambda out, y: F.cross_entropy(out, y, reduction='sum')/len(out)))
    assert found.set_index('rule').loc['first_loss','severity']=='not checked'

@pytest.mark.parametrize('by,fires', [(3,False),(30,True)])
def test_last_layer_too_large(by, fires):
    "The first loss tells: 2 times chance, and .5"
    def make():
        model = flat_mlp()()
        model[-1].weight.data.mul_(by)
        return model
    rec = train_digits(make, torch.optim.Adam, 1e-3, epochs=1)
    first = rec.frame('steps')['loss'].iloc[0]
    assert (first>2*math.log(10)+.5)==fires and first<3*math.log(10)+1
    assert ('first_loss' in set(severe(diagnose(rec))['rule']))==fires

@pytest.mark.parametrize('update_every', [None,5])
@pytest.mark.parametrize('act,biases', [(nn.ReLU,False),(nn.ReLU,True),(nn.Tanh,True)])
def test_all_weights_at_0(act, biases, update_every):
    "With biases at 0 too nothing but the last bias ever learns. One finding in each case"
    def make():
        model = flat_mlp(act, depth=3)()
        for p in model.parameters():
            if biases or p.dim()>1: nn.init.zeros_(p)
        return model
    found = diagnose(train_digits(make, update_every=update_every))
    assert list(severe(found)['rule'])==['zero_start'] and not found.ok, str(found)
    assert found.tensors('zero_start')==['1.weight','3.weight','5.weight','7.weight'] and f'and {4 if biases else 3} of these have a gradient of 0' in the_warning(found, 'zero_start')['evidence']

def test_tiny_init_is_one_finding():
    "That the loss stands still follows from the depth that no gradient comes through"
    def make():
        model = flat_mlp(nn.Tanh, depth=6)()
        for p in model.parameters():
            if p.dim()>1: nn.init.normal_(p, 0, 1e-3)
        return model
    found = diagnose(train_digits(make, lr=.02))
    assert list(severe(found)['rule'])==['depth'], str(found)

@pytest.mark.parametrize('update_every', [None,5])
def test_low_lr(update_every):
    "Also where updates were not measured, as in README"
    found = diagnose(train_digits(convs(), torch.optim.Adam, 1e-7, update_every=update_every))
    assert 'updates are too small, at lr 1e-07' in the_warning(found, 'loss_still')['evidence'] and not found.ok
    assert list(severe(found)['rule'])==['loss_still'], str(found)

def test_clipped_away():
    found = diagnose(train_digits(convs(), clip=.001))
    assert 'clipping leaves' in the_warning(found, 'loss_still')['evidence'] and 'max_norm' in the_warning(found, 'loss_still')['try'] and not found.ok
    assert list(severe(found)['rule'])==['loss_still'], str(found)

def test_nothing_left():
    "Never ok: gradients are cleared before the step"
    class Clears(torch.optim.SGD):
        def step(self, closure=None): return super().step(closure)
    torch.manual_seed(0)
    model = flat_mlp()()
    opt = Clears(model.parameters(), lr=.1)
    xs,ys = pixels()
    with GradRecorder(model, opt) as rec:
        for i in range(12):
            loss = F.cross_entropy(model(xs[:64]), ys[:64])
            rec.loss(loss)
            loss.backward()
            opt.zero_grad()
            opt.step()
    found = diagnose(rec)
    assert not found.ok and the_warning(found, 'no_gradient')['tensor']=='(all)' and len(severe(found))==1, str(found)

def test_starved_router():
    "Behind a product with something tiny"
    found = diagnose(train_digits(lambda: Tiny(1e-8), torch.optim.Adam, 1e-3))
    assert the_warning(found, 'starved')['tensor']=='router.weight' and not found.ok

def test_starved_beside_dead_units():
    "Behind units that died nothing comes through: one finding"
    dies = dict(zeros=np.r_[0, np.full(29, 95)])
    names = ['a.weight','b.weight','c.weight','d.weight','e.weight']
    norms = pd.concat([pd.DataFrame(calm_at(30)|dict(name=name, group=0, norm=1e-9 if name=='c.weight' else 1., weight_norm=2., dot=.5)) for name in names], ignore_index=True)
    bias = calm_at(30)|dict(kind='param', name='c.bias', out=0, call=0, numel=100, max_abs=.1, mean_abs=.05, norm=.5, mean=0., std=.06, zeros=0, nonfinite=0, above=0, skipped=False)
    def rules_of(**cols): return list(severe(diagnose(GradRecord(pd.DataFrame(bias|cols), steps=calm_steps(30, loss=np.linspace(2, 1, 30)), params=norms)))['rule'])
    assert (rules_of(), rules_of(**dies))==(['starved'],['dead_units'])

def test_lone_spike():
    "One batch a thousandfold; Adam's step is bounded, so that the loss stays calm"
    def make():
        model = flat_mlp()()
        state = dict(n=0)
        def hook(g):
            state['n'] += 1
            return g*1e3 if state['n']==41 else g
        model[-1].register_forward_hook(lambda m, i, o: o.register_hook(hook) and None)
        return model
    found = diagnose(train_digits(make, torch.optim.Adam, 1e-3))
    assert the_warning(found, 'lone_spike')['iterations']=='40', str(found)

def test_nan_target():
    "The advice names the target; that the loss rose is no finding of its own"
    def target(y):
        y = one_hot(y)
        y[700] = math.nan
        return y
    found = diagnose(train_digits(flat_mlp(), loss=F.binary_cross_entropy_with_logits, target=target))
    assert 'target' in the_warning(found, 'non_finite')['try'] and list(severe(found)['rule'])==['non_finite'], str(found)

def test_detached():
    class Cut(nn.Module):
        def forward(self, x): return x.detach()
    found = diagnose(train_digits(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64,64), nn.ReLU(), Cut(), nn.Linear(64,10))))
    row = the_warning(found, 'unused')
    assert row['tensor']=='1.weight' and 'detach' in row['try'] and 'reentrant' in row['try']

def test_expert_without_a_token():
    def make():
        model = Experts()
        model.router.bias.data[2] = -60.
        return model
    row = the_warning(diagnose(train_digits(make, epochs=1, **usual_adam)), 'unused')
    assert row['tensor'].startswith('experts.2.') and 'an expert that got no token' in row['try']

@pytest.mark.parametrize('make', [lora,lora_with_head])
def test_adapters_are_meant(make):
    found = diagnose(train_digits(make, torch.optim.Adam, .01, epochs=1))
    row = found[found['rule']=='frozen'].iloc[0]
    assert row['severity']=='note' and row['try'].startswith('nothing, if that is meant (LoRA, adapters)'), str(found)

def test_frozen_layer_behind_a_trained_one_is_no_adapter():
    "Also where the head begins at 0"
    def make():
        model = zero_head()
        model[3].requires_grad_(False)
        return model
    assert the_warning(diagnose(train_digits(make, epochs=1)), 'frozen')['try'].startswith('learn.unfreeze()')

def test_names_of_all():
    "Dead layers are named, up to three, and counted"
    def make():
        model = flat_mlp(depth=6)()
        for i in (1,3,5,7,9): model[i].bias.data.fill_(-50)
        return model
    evidence = the_warning(diagnose(train_digits(make)), 'dead_units')['evidence']
    assert 'of its units output 0 on the whole batch (dead)' in evidence and 'also in 1.bias, 3.bias, 5.bias and 1 more' in evidence

def test_units_silent_from_the_start_are_a_note():
    "And those that died in training are a warning"
    def make():
        model = flat_mlp()()
        model[3].bias.data[:32].fill_(-50)
        return model
    found = diagnose(train_digits(make, torch.optim.Adam, 2e-3))
    row = found[found['rule']=='dead_units'].iloc[0]
    assert row['severity']=='note' and 'at the first step' in row['evidence'] and found.ok, str(found)
    sick = diagnose(train_digits(flat_mlp(), torch.optim.Adam, .3))
    row = the_warning(sick, 'dead_units')
    share,begun = (int(part.split('%')[0].split()[-1]) for part in row['evidence'].split('(dead)')[:2]) if 'first step' in row['evidence'] else (100,0)
    assert share>begun+25

def test_the_layer_with_most_dead_units_is_named():
    "Where no layer is dead as a whole, it is not the one nearest the loss"
    def make():
        model = flat_mlp(depth=3)()
        for i,n in (3,48),(5,32): model[i].bias.data[:n].fill_(-50)
        return model
    found = diagnose(train_digits(make))
    row = found[found['rule']=='dead_units'].iloc[0]
    assert row['tensor']=='3.bias' and 'also in 5.bias' in row['evidence'], str(found)

def test_hard_batch_of_a_converged_run_is_no_spike():
    "One batch with a large loss and gradient, and the loss is as before right after it"
    n = 120
    norm,loss = np.ones(n),np.full(n, .002)
    norm[80],loss[80] = 11.,.02
    found = diagnose(GradRecord(steps=calm_steps(n, norm=norm, loss=loss)))
    assert 'spike' not in set(severe(found)['rule'])
    loss[81:] = .02
    assert 'spike' in set(severe(diagnose(GradRecord(steps=calm_steps(n, norm=norm, loss=loss))))['rule'])

def test_weight_decay_of_dead_layers_is_no_update():
    "What a dead layer's weights move is weight decay: one finding says why, and none says change the learning rate"
    def make():
        model = flat_mlp(depth=3)()
        model[5].bias.data.fill_(-50)
        return model
    found = diagnose(train_digits(make, torch.optim.AdamW, 1e-3))
    assert list(severe(found)['rule'])==['dead_units'] and 'update_ratio' not in set(found['rule'][found['severity']=='note']), str(found)

# --- the verdict

def test_first_line():
    found = diagnose(train_digits(flat_mlp()))
    n = len({r for r in found.attrs and diagnose(GradRecord())['rule']})
    assert str(found).splitlines()[0]==f'{n} of {n} checks, nothing wrong found; 6 of 6 parameters trained'

def test_parameters_without_a_gradient_are_not_trained():
    "A weight and a bias behind a detach(), as autograd has it"
    class HeadAlone(nn.Module):
        def __init__(self):
            super().__init__()
            self.body,self.head = nn.Linear(64,20),nn.Linear(20,10)
        def forward(self, x): return self.head(self.body(x.flatten(1)).relu().detach())
    nets = []
    def make():
        nets.append(HeadAlone())
        return nets[0]
    found = diagnose(train_digits(make, epochs=1))
    nets[0](pixels()[0][:8]).sum().backward()
    grads = [p.grad for p in nets[0].parameters()]
    assert f'; {sum(g is not None for g in grads)} of {len(grads)} parameters trained' in found.verdict and grads[0] is None

def test_rules_are_not_named_twice():
    "As not checked: in the verdict or, where they are many, below"
    few = diagnose(train_digits(flat_mlp(), epochs=1, update_every=None))
    assert few.verdict.endswith('; not checked: update_ratio') and str(few).count('not checked: ')==1
    assert str(diagnose(GradRecord(steps=calm_steps()))).count('not checked: ')==1

def test_what_was_not_checked():
    found = diagnose(GradRecord(steps=calm_steps(norm=0.)))
    first = str(found).splitlines()[0]
    assert 'not checked' not in first   # they are many: the last line has them
    assert first.startswith(f"{found.attrs['checked']} of {found.attrs['rules']} checks: 1 warning") and 'not checked: ' in str(found)
    assert diagnose(GradRecord()).verdict.startswith('0 of ') and 'nothing can be said' in diagnose(GradRecord()).verdict

def test_regression_is_not_judged():
    "Of a loss that is no cross-entropy over classes no guess is known"
    found = diagnose(train_digits(tail(1), lr=.01, loss=F.mse_loss, target=lambda y: y.float()[:,None], epochs=1))
    row = found[found['rule']=='first_loss'].iloc[0]
    assert row['severity']=='not checked' and 'does not look like a mean cross-entropy' in row['evidence']
    assert found.verdict.endswith('; not checked: first_loss')

def test_biases_of_no_use():
    "Before BatchNorm, and keys of attention: a note that names bias=False"
    for make,want in ((convs(nn.BatchNorm2d),'0.bias'), (lambda: DigitSequence(OwnBlocks),'body.blocks.0.attn.k.bias')):
        found = diagnose(train_digits(make, torch.optim.AdamW, 1e-3, epochs=1))
        row = found[found['rule']=='needless_bias'].iloc[0]
        assert (row['severity'], row['tensor'])==('note', want) and 'bias=False' in row['try'], str(found)
    assert 'needless_bias' not in set(diagnose(train_digits(convs(), epochs=1))['rule'])
