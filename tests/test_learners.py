"fastai's own learners, as a user makes them: vision, U-Net, tabular, collaborative filtering, text; and which of their tensors take part as they are frozen and unfrozen."
import io
from contextlib import redirect_stdout

import matplotlib.pyplot as plt
import numpy as np,pytest,torch
from fastai.basics import *
from fastai.callback.all import *
from fastai.collab import *
from fastai.tabular.all import *
from fastai.text.all import *
from fastai.vision.all import *
from torch import nn

from fastai_gradstats import GradNormCallback,GradStatsCallback
from oracles import Spy,Twin,check_outputs,check_params,fit,loaders,owners

del test,test_close,test_eq,test_eq_type,test_fail,test_fig_exists,test_is,test_ne,test_set,test_shuffled,test_sig,test_stdout,test_warns,test_overflow   # fastcore's, which fastai exports and pytest would collect

def pictures(n=6, bs=3, size=32, mask=False):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(2, (n,size,size) if mask else (n,), generator=g)
    return loaders(TensorImage(torch.randn(n,3,size,size, generator=g)), y, bs)

def vision(**kw): return vision_learner(pictures(), resnet18, pretrained=False, n_out=2, loss_func=CrossEntropyLossFlat(), **kw)
def unet(**kw): return unet_learner(pictures(mask=True, bs=2, n=4), resnet18, pretrained=False, n_out=2, loss_func=CrossEntropyLossFlat(axis=1), self_attention=True, **kw)

def frame(n=64):
    g = np.random.default_rng(0)
    return pd.DataFrame(dict(user=g.choice(list('abcdef'), n), title=g.choice(list('uvwxyz'), n), age=g.normal(size=n), rating=g.uniform(1,5,n)))

def tabular(**kw):
    dls = TabularDataLoaders.from_df(frame(), procs=[Categorify,Normalize], cat_names=['user','title'], cont_names=['age'], y_names='rating', y_block=RegressionBlock(), valid_idx=list(range(48,64)), bs=16, num_workers=0)
    return tabular_learner(dls, layers=[20,10], config=tabular_config(ps=.1, embed_p=.1), **kw)

def collab(use_nn=False, **kw):
    return collab_learner(CollabDataLoaders.from_df(frame(), seed=0, bs=16, num_workers=0), n_factors=5, use_nn=use_nn, y_range=(.5,5.5), **kw)

config = dict(emb_sz=8, n_hid=10, n_layers=2)
def vocab(n=30): return ['xxunk','xxpad',*(f'w{i}' for i in range(n-2))]

def language_model(**kw):
    text = L(LMTensorText(torch.randint(2, 30, (200,), generator=torch.Generator().manual_seed(0))) for _ in range(2))
    dls = DataLoaders(*(LMDataLoader(t, bs=4, seq_len=12, num_workers=0) for t in (text,text[:1])))
    dls.vocab = vocab()
    return language_model_learner(dls, AWD_LSTM, pretrained=False, config={**awd_lstm_lm_config,**config}, **kw)

def classifier(**kw):
    x = torch.randint(2, 30, (12,14), generator=torch.Generator().manual_seed(0))
    x[::3,10:] = 1   # padding
    dls = loaders(TensorText(x), torch.arange(12)%2, 4)
    dls.vocab = L(vocab(), ['no','yes'])
    return text_classifier_learner(dls, AWD_LSTM, pretrained=False, n_out=2, seq_len=5, config={**awd_lstm_clas_config,**config}, loss_func=CrossEntropyLossFlat(), **kw)

learners = dict(vision=vision, unet=unet, tabular=tabular, collab=collab, collab_nn=partial(collab, use_nn=True), language_model=language_model, classifier=classifier)

def text_loss(learn, m):
    "With the regularisation that fastai's callbacks add, alpha 2 and beta 1"
    pred,raw,out = (o[-1] if is_listy(o) else o for o in m(*learn.xb))
    return learn.loss_func(pred, *learn.yb) + 2*out.float().pow(2).mean() + (raw[:,1:]-raw[:,:-1]).float().pow(2).mean()

def watched(make, **kw):
    "The learner, what was recorded and what was to be recorded"
    set_seed(0)
    twin,spy = Twin(loss=text_loss if make in (language_model,classifier) else None),Spy()
    return make(cbs=[GradStatsCallback(), GradNormCallback(), twin, spy], **kw),twin,spy

def check(learn, twin, spy):
    check_outputs(learn.grad_stats.df, twin, owners(learn.model))
    check_params(learn.grad_stats.df, spy, learn.grad_norm.norms)
    assert len(twin.grads)==learn.grad_stats.df['iteration'].max()+1
    assert not any('gradstats' in type(h).__module__ for m in learn.model.modules() for h in m._forward_hooks.values())

@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n=='unet' else n for n in learners])
def test_learner(name):
    "No special argument: fit, look."
    learn,twin,spy = watched(learners[name])
    fit(learn)
    check(learn, twin, spy)
    ax = learn.grad_stats.plot_grad_log10()
    assert isinstance(ax, plt.Axes)
    plt.close('all')
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    check(learn, twin, spy)
    assert learn.grad_stats.df['fit'].unique().tolist()==[0,1]

def test_truncated_backprop():
    "The encoder runs on each stretch of five tokens; calls are counted over the batch."
    learn,twin,spy = watched(classifier)
    fit(learn)
    d = learn.grad_stats.df
    assert set(d.loc[d['name'].str.endswith('rnns.0.module'),'call'])=={0,1,2}

# --- frozen and unfrozen

def rows(learn, fit):
    "Names with rows in a fit, by kind; each has a row in each of its iterations or steps"
    d = learn.grad_stats.df
    d = d[d['fit']==fit]
    for k,at in (('output','iteration'),('param','step')):
        n = d[d['kind']==k].groupby('name', observed=True)[at].nunique()
        assert (n==d[d['kind']==k][at].nunique()).all()
    return [set(d.loc[d['kind']==k,'name']) for k in ('output','param')]

def group_names(learn):
    "Parameter names of each of the splitter's groups"
    name = {id(p):n for n,p in learn.model.named_parameters()}
    return [{name[id(p)] for p in g} for g in learn.splitter(learn.model)]

def test_freezing():
    "Rows appear when a tensor starts to take part and stop when it ceases to; fits are told apart."
    learn,twin,spy = watched(vision, train_bn=False)
    a,b,c = group_names(learn)
    owner = lambda names: {n.rpartition('.')[0] for n in names}
    for i,(stage,want) in enumerate(((learn.freeze, c), (partial(learn.freeze_to, -2), b|c), (learn.unfreeze, a|b|c), (learn.freeze, c), (learn.unfreeze, a|b|c))):
        stage()
        fit(learn, lr=slice(1e-5,1e-3))
        assert rows(learn, i)==[owner(want), want]
    check(learn, twin, spy)
    assert learn.grad_stats.df['fit'].unique().tolist()==[0,1,2,3,4]
    assert learn.grad_stats.df['iteration'].unique().tolist()==list(range(10))
    assert learn.grad_norm.df['fit'].tolist()==[0,0,1,1,2,2,3,3,4,4]

def test_frozen_but_batchnorm():
    "fastai trains BatchNorm in a frozen body: its weights have rows, the convolutions' have not, while gradients pass through all outputs from the first BatchNorm on."
    learn,twin,spy = watched(vision)
    learn.freeze()
    fit(learn)
    out,par = rows(learn, 0)
    convs = {n for n,m in learn.model.named_modules() if isinstance(m, nn.Conv2d)}
    assert not par & {f'{n}.weight' for n in convs} and '0.1.weight' in par
    assert out==set(owners(learn.model))-{'0.0'}
    check(learn, twin, spy)

def test_fine_tune():
    learn,twin,spy = watched(vision, train_bn=False)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, freeze_epochs=1)
    assert rows(learn, 0)[1]==group_names(learn)[-1] and len(rows(learn, 1)[1])==len(list(learn.model.parameters()))
    check(learn, twin, spy)
    d = learn.grad_stats.df
    assert d.groupby('iteration')[['fit','epoch']].first().values.tolist()==[[0,0]]*2+[[1,0]]*2+[[1,1]]*2

class Unfreeze(Callback):
    "In mid-fit"
    def __init__(self, epoch, to): self.at,self.to = epoch,to
    def before_epoch(self):
        if self.epoch==self.at: self.learn.freeze_to(self.to)

@pytest.mark.parametrize('to', (0,-1))
def test_frozen_in_mid_fit(to):
    "From one epoch to the next."
    learn,twin,spy = watched(vision, train_bn=False)
    learn.freeze_to(-1-to)
    fit(learn, 3, cbs=Unfreeze(1, to))
    check(learn, twin, spy)
    d = learn.grad_stats.df
    n = d[d['kind']=='param'].groupby('epoch')['name'].nunique()
    allp,head = len(list(learn.model.parameters())),len(group_names(learn)[-1])
    assert n.tolist()==([head,allp,allp] if to==0 else [allp,head,head])

class Gradual(Callback):
    "One more layer per batch"
    def before_batch(self):
        if self.training:
            for i,m in enumerate(self.model[1:]): m.requires_grad_(i>=2-self.iter)

def test_frozen_in_mid_epoch():
    "A module that becomes trainable between two batches."
    set_seed(0)
    g = torch.Generator().manual_seed(0)
    dls = loaders(torch.randn(12,4, generator=g), torch.randint(3, (12,), generator=g), 4)
    twin,spy = Twin(),Spy()
    learn = fit(Learner(dls, nn.Sequential(nn.Flatten(), *(nn.Linear(4 if i<2 else 4,4 if i<2 else 3) for i in range(3))), loss_func=CrossEntropyLossFlat(), opt_func=SGD, cbs=[Gradual(), GradStatsCallback(), GradNormCallback(), twin, spy]))
    check(learn, twin, spy)
    d = learn.grad_stats.df
    assert d[d['kind']=='output'].groupby('iteration')['name'].apply(list).tolist()==[['3'],['2','3'],['1','2','3']]

@pytest.mark.parametrize('name', ('language_model','classifier'))
def test_text_freezing(name):
    "ULMFiT's gradual unfreezing, with an embedding that is tied to the decoder in the language model."
    learn,twin,spy = watched(learners[name])
    gs = group_names(learn)
    for i in range(1,len(gs)+1):
        learn.freeze_to(-i)
        fit(learn, lr=slice(1e-4,1e-3))
        assert rows(learn, i-1)[1]==set().union(*gs[-i:])
    check(learn, twin, spy)

def test_discriminative_lrs():
    "Rows of GradNorm carry the optimizer's groups and the last group's rate."
    learn,twin,spy = watched(vision)
    fit(learn, lr=slice(1e-5,1e-3))
    p,gs = learn.grad_norm.by('param'),group_names(learn)
    assert learn.grad_norm.df['lr'].tolist()==[1e-3]*2
    for step,d in p.groupby('step'):
        for i,g in enumerate(learn.opt.param_lists): assert set(d.loc[d['group']==i,'name'])==gs[i] and len(g)==len(gs[i])
    by = learn.grad_norm.by('group')
    want = [np.sqrt(sum((g[n]**2).sum() for n in names)) for g in spy.grads for names in gs]
    np.testing.assert_allclose(by['norm'], want, rtol=1e-5)

def test_lr_find(tmp_path):
    "`lr_find` on a real learner, frozen, then a fit: two phases, no row of one in the lists of the other."
    learn,twin,spy = watched(tabular)
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging(), redirect_stdout(io.StringIO()): learn.lr_find(num_it=7, show_plot=False, suggest_funcs=None)
    d = learn.grad_stats.df
    assert set(d['phase'])=={'lr_find'} and d['iteration'].max()==6 and len(learn.grad_stats.stats)==0
    twin.grads,twin.n,spy.grads,spy.norms = {},0,[],[]
    fit(learn)
    d = learn.grad_stats.select(phase='fit').df
    assert (d['fit']==1).all()
    check_outputs(d, twin, owners(learn.model))
    check_params(d, spy, learn.grad_norm.norms)
