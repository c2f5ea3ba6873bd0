"Sick networks are named at the right tensor; healthy ones get nothing above a note."
import numpy as np,pandas as pd,pytest,torch
from fastai.basics import *
from fastai.callback.training import GradientClip
from torch import nn
from fastai_gradstats import GradNormCallback,GradRecord,GradStatsCallback,compare,diagnose,digits
from helpers.records import calm_at,calm_steps

def deep_mlp(depth=3, n=64, init=None):
    m = nn.Sequential(nn.Flatten(), *(l for _ in range(depth-1) for l in (nn.Linear(64 if _==0 else n,n), nn.ReLU())), nn.Linear(n,10))
    if init: init(m)
    return m

def strided_cnn(bn=False):
    block = lambda i,o: [nn.Conv2d(i,o,3,2,1), *([nn.BatchNorm2d(o)] if bn else []), nn.ReLU()]
    return nn.Sequential(*block(1,16), *block(16,32), nn.Flatten(), nn.Linear(128,10))

class DigitRows(nn.Module):
    "Rows of a digit as a sequence"
    def __init__(self, kind):
        super().__init__()
        self.inp = nn.Linear(8,32)
        if kind=='lstm': self.body = nn.LSTM(32,32,batch_first=True)
        else: self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(32,4,64,dropout=0.,batch_first=True), 2)
        self.out = nn.Linear(32,10)
    def forward(self, x):
        x = self.body(self.inp(x[:,0]))
        return self.out((x[0] if isinstance(x, tuple) else x)[:,-1])

def diagnose_run(model, lr=.1, epochs=3, cbs=(), opt_func=SGD):
    "Findings, by rule"
    set_seed(0)
    learn = Learner(digits(), model() if callable(model) and not isinstance(model, nn.Module) else model, loss_func=nn.CrossEntropyLoss(), opt_func=opt_func,
                    cbs=[GradStatsCallback(), GradNormCallback(), *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr)
    f = diagnose(learn)
    return f, {r: d for r,d in zip(f['rule'], f.to_dict('records'))}

@pytest.mark.parametrize('model,lr,opt',
                         [(deep_mlp,.01,SGD), (deep_mlp,.1,SGD), (deep_mlp,.3,SGD), (strided_cnn,.1,SGD),
                          (partial(strided_cnn,True),.1,SGD), (partial(strided_cnn,True),1,SGD),
                          (partial(DigitRows,'lstm'),.01,Adam), (partial(DigitRows,'transformer'),.01,SGD)],
                         ids='mlp-.01 mlp-.1 mlp-.3 cnn-.1 batchnorm-.1 batchnorm-1 lstm transformer'.split())
def test_healthy(model, lr, opt):
    f,_ = diagnose_run(model, lr, opt_func=opt)
    assert f.ok, f.to_string()

def assert_found(found, rule, tensor=None, severity='warning'):
    assert rule in found and found[rule]['severity']==severity, found.keys()
    assert tensor is None or found[rule]['tensor']==tensor, found[rule]

def test_vanishing(): assert_found(diagnose_run(partial(deep_mlp, 20), .1, 1)[1], 'depth', '1')

def test_high_lr():
    "With BatchNorm the norm and the loss jump; at lr 1 a plain MLP loses most units of a layer"
    assert_found(diagnose_run(partial(strided_cnn, True), 30., 2)[1], 'spike')
    assert_found(diagnose_run(deep_mlp, 1.)[1], 'dead_units', '1.bias')

def test_dead():
    def kill(m): m[3].bias.data.fill_(-50)
    assert_found(diagnose_run(partial(deep_mlp, init=kill))[1], 'dead_units', '3.bias')

def test_clipping_is_a_note():
    f,d = diagnose_run(deep_mlp, cbs=[GradientClip(.01)])
    assert_found(d, 'clipping', '(all)', 'note')
    assert f.ok, f.to_string()

def test_non_finite():
    class Bad(Callback):
        def before_batch(self):
            if self.train_iter==5: self.learn.xb = (self.xb[0]/0.,)
    d = diagnose_run(deep_mlp, cbs=[Bad()])[1]
    assert_found(d, 'non_finite', '1', 'error')
    assert d['non_finite']['evidence']=='not finite from iteration 5 on: in forward between (input) and 1'

def test_frozen():
    def freeze(m): m[3].weight.requires_grad_(False)
    assert_found(diagnose_run(partial(deep_mlp, init=freeze))[1], 'frozen', '3.weight')
    def body(m): m[1].requires_grad_(False)
    f,d = diagnose_run(partial(deep_mlp, init=body))
    assert_found(d, 'frozen', '1.weight', 'note')

def test_unused():
    def add(m): m[5].extra = nn.Parameter(torch.ones(3))
    assert_found(diagnose_run(partial(deep_mlp, init=add))[1], 'unused', '5.extra')

class HalfWithoutScaler(Callback):
    "Autocast to fp16 without a scaler"
    order = 10
    def before_fit(self): self.autocast = torch.autocast('cpu', torch.float16)
    def before_batch(self): self.autocast.__enter__()
    def after_loss(self): self.autocast.__exit__(None, None, None)

def test_fp16_flush():
    def shrink(m):
        for l in m:
            if isinstance(l, nn.Linear): l.weight.data.mul_(.02)
    assert_found(diagnose_run(partial(deep_mlp, 5, init=shrink), epochs=1, cbs=[HalfWithoutScaler()])[1], 'fp16_flush', '1.weight')

def update_ratios(**ratios):
    "A frame of |update|/|weight| per parameter, over 20 steps"
    one = lambda n,r: pd.DataFrame(calm_at(20)|dict(name=n, group=0, norm=1., weight_norm=2., dot=.5, update_norm=2*r, update_ratio=r))
    d = pd.concat([one(n.replace('_', '.'), r) for n,r in ratios.items()], ignore_index=True)
    return d.assign(name=d['name'].astype('category'))

def falling(n): return calm_steps(n, loss=np.linspace(2, 1, n))

def findings_of(rule, rec, **kw):
    "(severity, tensor, iterations, evidence) of each finding of a rule"
    f = diagnose(rec, **kw)
    return [tuple(r) for r in f.loc[f['rule']==rule, ['severity','tensor','iterations','evidence']].to_numpy()]

def filled(n, *idx, of=True, else_=False):
    a = np.full(n, else_)
    a[list(idx)] = of
    return a

@pytest.mark.parametrize('ratios,want', [
    (dict(a_weight=1e-3, b_weight=1e-2), []),
    (dict(a_weight=1e-3, b_weight=.2, c_weight=.5), [('warning','c.weight')]),
    (dict(a_weight=1e-3, b_weight=1e-5), [('note','b.weight')]),
    (dict(a_weight=1e-5, b_weight=1e-6), [('warning','b.weight')]),          # nothing moves
    (dict(a_weight=.2, b_weight=1e-5), [('warning','a.weight'), ('note','b.weight')]),
    (dict(a_weight=1e-3, a_bias=3.), [])], ids=str)                          # a bias starts at 0
def test_update_ratio(ratios, want):
    assert [o[:2] for o in findings_of('update_ratio', GradRecord(steps=falling(20), params=update_ratios(**ratios)))]==want

@pytest.mark.parametrize('ratio,rule', [(1e-5,'loss_still'),(.5,'update_ratio')])
def test_one_finding_of_updates(ratio, rule):
    "Where the loss stands still too: updates that are too small, or too large, and not both"
    f = diagnose(GradRecord(steps=calm_steps(20), params=update_ratios(a_weight=ratio, b_weight=ratio)))
    assert f.loc[f['severity']=='warning', 'rule'].tolist()==[rule]

def test_update_ratio_of_what_is_left():
    "Where most weights get no gradient, that a last one hardly moves is a note: what cut the others off is the finding"
    params = update_ratios(a_weight=1e-5, b_weight=1e-5, c_weight=1e-5)
    params.loc[params['name']!='c.weight', 'norm'] = 0.
    assert [o[:2] for o in findings_of('update_ratio', GradRecord(steps=falling(20), params=params))]==[('note','c.weight')]

def test_update_ratio_threshold():
    rec = GradRecord(steps=calm_steps(20), params=update_ratios(a_weight=.05))
    assert not findings_of('update_ratio', rec) and findings_of('update_ratio', rec, high=.01)[0][:2]==('warning','a.weight')

def test_zero_norm():
    rec = GradRecord(steps=calm_steps(norm=filled(100, 7, 8, 9, of=0., else_=1.)))
    assert findings_of('zero_norm', rec)==[('warning', '(all)', '7 to 9 (3)', 'norm exactly 0 in 3 of 100 steps')]
    assert not findings_of('zero_norm', GradRecord(steps=calm_steps(norm=1e-30)))
    skip = filled(100, 7)
    assert not findings_of('zero_norm', GradRecord(steps=calm_steps(norm=np.where(skip, 0., 1.), skipped=skip)))

@pytest.mark.parametrize('n,severity', [(0,None),(3,'note'),(20,'note'),(21,'warning'),(100,'warning')])
def test_skipped(n, severity):
    got = findings_of('skipped', GradRecord(steps=calm_steps(skipped=filled(100, *range(n)))))
    assert [(o[0],o[3]) for o in got]==([(severity, f'{n} of 100 steps skipped')] if n else [])

def test_few_skipped_steps_of_few():
    "A scaler looks for its scale in the first steps"
    assert findings_of('skipped', GradRecord(steps=calm_steps(10, skipped=filled(10, 0, 1, 2, 3, 4))))[0][0]=='note'

@pytest.mark.parametrize('end,named', [(1.,False),(1.4,False),(1.6,True),(np.nan,True),(np.inf,True)])
def test_loss_rose(end, named):
    loss = np.r_[np.ones(80), np.full(20, end)]
    got = findings_of('loss_rose', GradRecord(steps=calm_steps(loss=loss, norm=filled(100, 60, of=5., else_=1.)), params=update_ratios(a_weight=1e-3)))
    assert len(got)==named and all(o[0]=='warning' and 'loss 1 at the start' in o[3] for o in got)

def test_loss_rose_names_the_largest_gradient():
    "Of the step with the largest norm"
    par = update_ratios(a_weight=1e-3, b_weight=1e-3)
    par.loc[(par['name']=='b.weight')&(par['step']==7), 'norm'] = 9.
    rec = GradRecord(steps=calm_steps(20, loss=np.linspace(1, 3, 20), norm=filled(20, 7, of=9.1, else_=1.)), params=par)
    assert [(o[1],o[3]) for o in findings_of('loss_rose', rec)]==[('', 'loss 1.21 at the start, 2.95 at the end; largest norm at iteration 7, in b.weight')]

def test_a_batch_that_was_left_out_is_no_loss():
    "A NaN that stopped the fit, or was skipped, before the optimizer took it"
    loss = np.r_[np.ones(19), np.nan]
    def found(**cols): return findings_of('loss_rose', GradRecord(steps=calm_steps(20, loss=loss, **cols)))
    assert found() and not found(skipped=filled(20, 19))

def test_loss_rose_needs_ten_steps(): assert not findings_of('loss_rose', GradRecord(steps=calm_steps(9, loss=np.arange(1., 10))))

def test_spike_needs_a_rising_loss():
    norm = filled(100, 60, of=20., else_=1.)
    assert not findings_of('spike', GradRecord(steps=calm_steps(norm=norm)))
    got = findings_of('spike', GradRecord(steps=calm_steps(norm=norm, loss=np.where(np.arange(100)>=60, 3., 1.))))
    assert [o[:3] for o in got]==[('warning','(all)','60')] and '20 times' in got[0][3]

def test_spike_names_the_largest_gradient():
    "Of the step with the jump, not of the loudest step before"
    par = update_ratios(a_weight=1e-3, b_weight=1e-3)
    par.loc[(par['name']=='b.weight')&(par['step']==15), 'norm'] = 19.
    par.loc[(par['name']=='a.weight')&(par['step']==14), 'norm'] = 20.
    rec = GradRecord(steps=calm_steps(20, norm=filled(20, 15, of=20., else_=1.), loss=np.where(np.arange(20)>=15, 3., 1.)), params=par)
    assert [o[:3] for o in findings_of('spike', rec)]==[('warning','b.weight','15')]

def test_comparison():
    "Each run by itself: the calm one is not blamed, and a rule that saw nothing of one run is not ok"
    sick = GradRecord(steps=calm_steps(norm=filled(100, 60, of=0., else_=1.)))
    f = diagnose(compare({'calm':GradRecord(steps=calm_steps()), 'sick':sick}))
    d = f[f['severity']!='not checked']
    assert d[['rule','severity','run','iterations']].to_numpy().tolist()==[['zero_norm','warning','sick','60']]
    assert f.loc[f['rule']=='depth','run'].tolist()==['calm','sick'] and not f.ok and f.attrs['checked']>0
    assert 'run' not in diagnose(sick) and diagnose(compare({'calm':GradRecord(steps=calm_steps())})).ok
    assert diagnose(compare({'calm':GradRecord(steps=calm_steps()), 'none':GradRecord()})).ok   # a run without a row is not in the comparison

def test_not_checked_is_not_ok():
    f = diagnose(GradRecord(steps=calm_steps()))
    assert f.ok and {'depth','dead_units','update_ratio'} <= set(f.loc[f['severity']=='not checked','rule'])
    assert not diagnose(GradRecord()).ok
