"fastai's own learners on toy data, and what is to be recorded of them."
import numpy as np,torch
from fastai.basics import *
from fastai.collab import *
from fastai.tabular.all import *
from fastai.text.all import *
from fastai.vision.all import *
from fastai_gradstats import GradNormCallback,GradStatsCallback
from helpers.oracles import GradSpy,Twin,check_outputs,check_params,owner_names
from helpers.training import loaders

def picture_loaders(n=6, bs=3, size=32, mask=False):
    "Random pictures in two classes, or with a class for each pixel"
    g = torch.Generator().manual_seed(0)
    y = torch.randint(2, (n,size,size) if mask else (n,), generator=g)
    return loaders(TensorImage(torch.randn(n,3,size,size, generator=g)), y, bs)

def vision_toy(**kw):
    return vision_learner(picture_loaders(), resnet18, pretrained=False, n_out=2, loss_func=CrossEntropyLossFlat(), **kw)

def unet_toy(**kw):
    dls = picture_loaders(mask=True, bs=2, n=4)
    loss = CrossEntropyLossFlat(axis=1)
    return unet_learner(dls, resnet18, pretrained=False, n_out=2, loss_func=loss, self_attention=True, **kw)

def ratings_frame(n=64):
    g = np.random.default_rng(0)
    return pd.DataFrame(dict(user=g.choice(list('abcdef'), n), title=g.choice(list('uvwxyz'), n),
                             age=g.normal(size=n), rating=g.uniform(1,5,n)))

def tabular_toy(**kw):
    dls = TabularDataLoaders.from_df(
        ratings_frame(), procs=[Categorify,Normalize], cat_names=['user','title'], cont_names=['age'], y_names='rating',
        y_block=RegressionBlock(), valid_idx=list(range(48,64)), bs=16, num_workers=0)
    return tabular_learner(dls, layers=[20,10], config=tabular_config(ps=.1, embed_p=.1), **kw)

def collab_toy(use_nn=False, **kw):
    dls = CollabDataLoaders.from_df(ratings_frame(), seed=0, bs=16, num_workers=0)
    return collab_learner(dls, n_factors=5, use_nn=use_nn, y_range=(.5,5.5), **kw)

text_config = dict(emb_sz=8, n_hid=10, n_layers=2)
def toy_vocab(n=30): return ['xxunk','xxpad',*(f'w{i}' for i in range(n-2))]

def language_model_toy(**kw):
    text = L(LMTensorText(torch.randint(2, 30, (200,), generator=torch.Generator().manual_seed(0))) for _ in range(2))
    dls = DataLoaders(*(LMDataLoader(t, bs=4, seq_len=12, num_workers=0) for t in (text,text[:1])))
    dls.vocab = toy_vocab()
    config = {**awd_lstm_lm_config,**text_config}
    return language_model_learner(dls, AWD_LSTM, pretrained=False, config=config, **kw)

def classifier_toy(**kw):
    x = torch.randint(2, 30, (12,14), generator=torch.Generator().manual_seed(0))
    x[::3,10:] = 1   # padding
    dls = loaders(TensorText(x), torch.arange(12)%2, 4)
    dls.vocab = L(toy_vocab(), ['no','yes'])
    config = {**awd_lstm_clas_config,**text_config}
    return text_classifier_learner(dls, AWD_LSTM, pretrained=False, n_out=2, seq_len=5, config=config, loss_func=CrossEntropyLossFlat(), **kw)

fastai_learners = dict(vision=vision_toy, unet=unet_toy, tabular=tabular_toy, collab=collab_toy, collab_nn=partial(collab_toy, use_nn=True),
                       language_model=language_model_toy, classifier=classifier_toy)

def text_loss(learn, m):
    "With the regularisation that fastai's callback adds: alpha 2 and beta 1, in 2.7 none, which forgets them"
    pred,raw,out = (o[-1] if is_listy(o) else o for o in m(*learn.xb))
    loss = learn.loss_func(pred, *learn.yb)
    added = getattr(learn, 'rnn_regularizer', None)
    if added is None: return loss
    return loss + added.alpha*out.float().pow(2).mean() + added.beta*(raw[:,1:]-raw[:,:-1]).float().pow(2).mean()

def watched_learner(make, **kw):
    "The learner, what was recorded and what was to be recorded"
    set_seed(0)
    twin,spy = Twin(loss=text_loss if make in (language_model_toy,classifier_toy) else None),GradSpy()
    return make(cbs=[GradStatsCallback(), GradNormCallback(), twin, spy], **kw),twin,spy

def check_watched(learn, twin, spy):
    "Every row is autograd's or the optimizer's, and no hook of ours is left"
    check_outputs(learn.grad_stats.df, twin, owner_names(learn.model))
    check_params(learn.grad_stats.df, spy, learn.grad_norm.norms)
    assert len(twin.grads)==learn.grad_stats.df['iteration'].max()+1
    assert not any('gradstats' in type(h).__module__ for m in learn.model.modules() for h in m._forward_hooks.values())

def names_by_kind(learn, fit):
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
