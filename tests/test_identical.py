"Training is the same with and without the callbacks, bit for bit: losses, weights, buffers, the optimizer's state and every random generator, in those cases of the page that no other file compares so."
import io,random,warnings
from contextlib import redirect_stdout

import numpy as np,pytest,torch
import torch.nn.functional as F
from fastai.basics import *
from fastai.callback.all import *
from torch import nn

from fastai_gradstats import GradNormCallback,GradStatsCallback
from oracles import fit,loaders
from test_learners import classifier,collab,language_model,tabular,vision
from test_models import Fn,Graph,Net,convnext,leaves,pictures,swin,vit
from test_more_cases import TwoLosses,TwoSteps
from test_training import Branch,Clip12,CPUAmp,Overflow,Raise,both,convnet,excs,learner,linear

del test,test_close,test_eq,test_eq_type,test_fail,test_fig_exists,test_is,test_ne,test_set,test_shuffled,test_sig,test_stdout,test_warns,test_overflow   # fastcore's, which fastai exports and pytest would collect

def traces(learn):
    "All that training left behind, as bytes"
    g = [torch.get_rng_state(), *(torch.tensor(l.item()) for l in learn.recorder.losses), *learn.model.state_dict().values()]
    def walk(o):
        for k,v in sorted(o.items()) if isinstance(o, dict) else enumerate(o):
            if isinstance(v, Tensor): g.append(v)
            elif isinstance(v, (dict,list,tuple)): walk(v)
    walk(learn.opt.state_dict())
    return [t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b'' for t in g],random.getstate(),np.random.get_state()[1].tobytes(),str(learn.opt.hypers)

def check(train, ours=both):
    "`train` takes callbacks, builds a learner and trains it"
    res = []
    for cbs in ([], ours()):
        set_seed(0)
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn = train(cbs)
        res.append(traces(learn))
    a,b = res
    assert len(a[0])>4 and len(a[0])==len(b[0])
    assert [i for i,(x,y) in enumerate(zip(a[0], b[0])) if x!=y]==[] and a[1:]==b[1:]
    return learn

def quiet(learn, what, *args, **kw):
    with learn.no_bar(), learn.no_logging(): getattr(learn, what)(*args, **kw)

def plain(epochs=2, **kw):
    "A case from arguments of `learner`"
    return lambda cbs: fit(learner(**{**kw, 'cbs':[*cbs,*(f() for f in kw.get('cbs', ()))]}), epochs)

def vec(f, n=1, loss=None, opt_func=Adam, cls=Learner, dtype=torch.float32, x=None, **kw):
    "Vectors through a function of its modules"
    def train(cbs):
        net = Net(f, **{k:m() for k,m in kw.items()})
        d = torch.randn(12,4, dtype=dtype) if x is None else x
        return fit(cls(loaders(d, torch.arange(len(d))%3, 4), net, loss_func=loss or (lambda o,y: sum(t.abs().mean() for t in leaves([o]))), opt_func=opt_func, lr=1e-2, cbs=cbs), n)
    return train

def pics(model): return lambda cbs: fit(Learner(loaders(*pictures(), 2), model(), loss_func=F.cross_entropy, opt_func=Adam, lr=1e-3, cbs=cbs))

def tune(cbs):
    learn = vision(cbs=cbs, train_bn=False)
    quiet(learn, 'fine_tune', 1)
    return learn

def stages(make):
    "Frozen, then more and more of it, then frozen again, at discriminative rates"
    def train(cbs):
        learn = make(cbs=cbs)
        for i in (1,2): learn.freeze_to(-i); fit(learn, lr=slice(1e-4,1e-2))
        quiet(learn, 'fine_tune', 1)
        learn.freeze()
        return fit(learn)
    return train

def around(cbs):
    "Everything that does not train, before, between and after"
    learn = learner(cbs=cbs)
    for _ in range(2):
        with learn.no_bar(), learn.no_logging():
            learn.validate(); learn.get_preds()
            learn.lr_find(num_it=5, show_plot=False, suggest_funcs=None)
            learn.fit(1)
    return learn

def broken(cbs):
    "Cancelled and interrupted in each way, and trained again"
    for i,exc in enumerate(excs):
        for event in ('before_batch','before_backward','after_step'):
            learn = learner(linear, [*cbs, Raise(exc, event, 1, 5+15*(i%2))], n=48)
            try: fit(learn)
            except (KeyboardInterrupt,Exception): pass
            fit(learn)
            for c in cbs: learn.remove_cb(c); c.reset()
    return learn

adamw = partial(OptimWrapper, opt=partial(torch.optim.AdamW, weight_decay=.1))
cases = dict(
    vit=pics(vit), swin=pics(swin), convnext=pics(convnext), vision=tune, tabular=stages(tabular), collab=lambda cbs: fit(collab(cbs=cbs), 2),
    language_model=lambda cbs: fit(language_model(cbs=cbs), 2), classifier=stages(classifier), around=around, broken=broken,
    lstm=vec(lambda s,x: s.r(x[:,:,None]), r=lambda: nn.LSTM(1,3, 2, dropout=.3, batch_first=True), n=2), dict_=vec(lambda s,x: dict(a=s.l(x), b=[s.l(x*2)]), l=lambda: nn.Linear(4,3)),
    chunk=vec(lambda s,x: s.c(s.l(x)), l=lambda: nn.Linear(4,4), c=lambda: Fn(lambda w,x: (x*w).chunk(2, 1))), view_in_place=vec(lambda s,x: s.l(x[:,None]).relu_(), l=lambda: nn.Linear(4,4)),
    hidden_view=vec(lambda s,x: s.t(s.l(x)).add_(1), l=lambda: nn.Linear(4,4), t=lambda: Fn(lambda w,x: (x*w).t())), shared=vec(lambda s,x: s.l(s.l(x).relu_()), l=lambda: nn.Linear(4,4)),
    sparse=vec(lambda s,x: s.e(x).mean(1), e=lambda: nn.Embedding(9,3, sparse=True), x=torch.arange(24).view(12,2)%9, opt_func=partial(OptimWrapper, opt=torch.optim.SGD)), float64=vec(lambda s,x: s.l(x).float(), l=lambda: nn.Linear(4,3).double(), dtype=torch.float64),
    complex=vec(lambda s,x: s.c(x.to(torch.complex64)), c=lambda: nn.Linear(4,4, dtype=torch.complex64), opt_func=partial(OptimWrapper, opt=torch.optim.Adam)), empty=vec(lambda s,x: torch.cat([s.e(x),s.l(x)*s.z], 1), e=lambda: nn.Linear(4,0), l=lambda: nn.Linear(4,2), z=lambda: nn.Parameter(torch.tensor(2.))),
    graph=vec(lambda s,x: s.l(x), l=lambda: nn.Linear(4,3), cls=Graph, loss=F.cross_entropy), parallel=vec(lambda s,x: s.l(x), l=lambda: nn.DataParallel(nn.Linear(4,3))),
    unused=plain(model=Branch), unused_torch=plain(model=Branch, opt_func=adamw), two_losses=plain(cls=TwoLosses), two_steps=plain(cls=TwoSteps),
    overflow=plain(cbs=[partial(CPUAmp, init_scale=2.**16, growth_interval=2), lambda: Overflow([1])]), fp16=plain(cbs=[partial(CPUAmp, torch.float16)], model=linear), bf16=plain(cbs=[partial(CPUAmp, torch.bfloat16)]),
    accumulate=plain(cbs=[partial(GradientAccumulation, 32), partial(GradientClip, .1)], n=80), clip_inf=plain(cbs=[partial(GradientClip, .01, norm_type=float('inf'))]), own_clip=plain(cbs=[Clip12]),
    l2=plain(opt_func=partial(Adam, wd=.1, decouple_wd=False)), adamw=plain(opt_func=adamw), nan=plain(cbs=[lambda: Overflow([1,3])]), stop=plain(cbs=[partial(EarlyStoppingCallback, min_delta=100)]), short=plain(cbs=[partial(ShortEpochCallback, .5)]))

@pytest.mark.parametrize('name', cases)
def test_same_bits(name): check(cases[name])

options = dict(hist=lambda p: [GradStatsCallback(hist=True)], hist_all=lambda p: [GradStatsCallback(hist='all', threshold=.1)], extra=lambda p: [GradStatsCallback(extra=dict(m=lambda g: g.float().abs().median()))],
               every=lambda p: [GradStatsCallback(every=3), GradNormCallback(every=2)], keep=lambda p: [GradStatsCallback('param', keep=2)], some=lambda p: [GradStatsCallback('output', include='0|6')],
               updates=lambda p: [GradNormCallback(update_every=2, show=True)], folder=lambda p: [GradStatsCallback(hist=True, folder=p/'a'), GradNormCallback(folder=p/'a')], twice=lambda p: both()+both())

@pytest.mark.parametrize('name', options)
def test_same_bits_with(name, tmp_path):
    "Whatever the callbacks are asked to record."
    check(plain(3), lambda: options[name](tmp_path))
