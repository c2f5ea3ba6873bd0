"Sick networks are named at the right tensor; healthy ones get nothing above a note."
import numpy as np,pytest,torch
from fastai.basics import *
from fastai.callback.training import GradientClip
from torch import nn

from fastai_gradstats import GradNormCallback,GradStatsCallback,diagnose,digits

del test,test_close,test_eq,test_eq_type,test_fail,test_fig_exists,test_is,test_ne,test_set,test_shuffled,test_sig,test_stdout,test_warns   # fastcore's

def mlp(depth=3, n=64, init=None):
    m = nn.Sequential(nn.Flatten(), *(l for _ in range(depth-1) for l in (nn.Linear(64 if _==0 else n,n), nn.ReLU())), nn.Linear(n,10))
    if init: init(m)
    return m

def cnn(bn=False):
    block = lambda i,o: [nn.Conv2d(i,o,3,2,1), *([nn.BatchNorm2d(o)] if bn else []), nn.ReLU()]
    return nn.Sequential(*block(1,16), *block(16,32), nn.Flatten(), nn.Linear(128,10))

class Seq(nn.Module):
    "Rows of a digit as a sequence"
    def __init__(self, kind):
        super().__init__()
        self.inp = nn.Linear(8,32)
        self.body = nn.LSTM(32,32,batch_first=True) if kind=='lstm' else nn.TransformerEncoder(nn.TransformerEncoderLayer(32,4,64,dropout=0.,batch_first=True), 2)
        self.out = nn.Linear(32,10)
    def forward(self, x):
        x = self.body(self.inp(x[:,0]))
        return self.out((x[0] if isinstance(x, tuple) else x)[:,-1])

def run(model, lr=.1, epochs=3, cbs=(), opt_func=SGD):
    "Findings, by rule"
    set_seed(0)
    learn = Learner(digits(), model() if callable(model) and not isinstance(model, nn.Module) else model, loss_func=nn.CrossEntropyLoss(), opt_func=opt_func,
                    cbs=[GradStatsCallback(), GradNormCallback(), *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr)
    f = diagnose(learn)
    return f, {r: d for r,d in zip(f['rule'], f.to_dict('records'))}

@pytest.mark.parametrize('model,lr,opt', [(mlp,.01,SGD),(mlp,.1,SGD),(mlp,.3,SGD),(cnn,.1,SGD),(partial(cnn,True),.1,SGD),(partial(cnn,True),1,SGD),(partial(Seq,'lstm'),.01,Adam),(partial(Seq,'transformer'),.01,SGD)], ids=str)
def test_healthy(model, lr, opt):
    f,_ = run(model, lr, opt_func=opt)
    assert f.ok, f.to_string()

def says(found, rule, tensor=None, severity='warning'):
    assert rule in found and found[rule]['severity']==severity, found.keys()
    assert tensor is None or found[rule]['tensor']==tensor, found[rule]

def test_vanishing(): says(run(partial(mlp, 20), .1, 1)[1], 'depth', '1')

def test_high_lr():
    "With BatchNorm the norm and the loss jump; at lr 1 a plain MLP loses most units of a layer"
    says(run(partial(cnn, True), 30., 2)[1], 'spike')
    says(run(mlp, 1.)[1], 'dead_units', '1.bias')

def test_dead():
    def kill(m): m[3].bias.data.fill_(-50)
    says(run(partial(mlp, init=kill))[1], 'dead_units', '3.bias')

def test_clipping_is_a_note():
    f,d = run(mlp, cbs=[GradientClip(.01)])
    says(d, 'clipping', '(all)', 'note')
    assert f.ok, f.to_string()

def test_non_finite():
    class Bad(Callback):
        def before_batch(self):
            if self.train_iter==5: self.learn.xb = (self.xb[0]/0.,)
    says(run(mlp, cbs=[Bad()])[1], 'non_finite', severity='error')

def test_frozen():
    def freeze(m): m[3].weight.requires_grad_(False)
    says(run(partial(mlp, init=freeze))[1], 'frozen', '3.weight')
    def body(m): m[1].requires_grad_(False)
    f,d = run(partial(mlp, init=body))
    says(d, 'frozen', '1.weight', 'note')

def test_unused():
    def add(m): m[5].extra = nn.Parameter(torch.ones(3))
    says(run(partial(mlp, init=add))[1], 'unused', '5.extra')

class Half(Callback):
    "Autocast to fp16 without a scaler"
    order = 10
    def before_fit(self): self.autocast = torch.autocast('cpu', torch.float16)
    def before_batch(self): self.autocast.__enter__()
    def after_loss(self): self.autocast.__exit__(None, None, None)

def test_fp16_flush():
    def shrink(m):
        for l in m:
            if isinstance(l, nn.Linear): l.weight.data.mul_(.02)
    says(run(partial(mlp, 5, init=shrink), epochs=1, cbs=[Half()])[1], 'fp16_flush')
