"fastai's own learners, as a user makes them: vision, U-Net, tabular, collaborative filtering, text."
import io
from contextlib import redirect_stdout
import matplotlib.pyplot as plt
import numpy as np,pytest
from fastai.basics import *
from fastai.callback.all import *
from fastai.collab import *
from fastai.tabular.all import *
from fastai.text.all import *
from fastai.vision.all import *
from helpers.learners import check_watched,classifier_toy,fastai_learners,group_names,tabular_toy,vision_toy,watched_learner
from helpers.oracles import check_outputs,check_params,owner_names
from helpers.training import fit

@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n=='unet' else n for n in fastai_learners])
def test_learner(name):
    "No special argument: fit, look."
    learn,twin,spy = watched_learner(fastai_learners[name])
    fit(learn)
    check_watched(learn, twin, spy)
    ax = learn.grad_stats.plot_grad_log10()
    assert isinstance(ax, plt.Axes)
    plt.close('all')
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    check_watched(learn, twin, spy)
    assert learn.grad_stats.df['fit'].unique().tolist()==[0,1]

def test_truncated_backprop():
    "The encoder runs on each stretch of five tokens; calls are counted over the batch."
    learn,twin,spy = watched_learner(classifier_toy)
    fit(learn)
    d = learn.grad_stats.df
    assert set(d.loc[d['name'].str.endswith('rnns.0.module'),'call'])=={0,1,2}

def test_discriminative_lrs():
    "Rows of GradNorm carry the optimizer's groups and the last group's rate."
    learn,twin,spy = watched_learner(vision_toy)
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
    learn,twin,spy = watched_learner(tabular_toy)
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging(), redirect_stdout(io.StringIO()): learn.lr_find(num_it=7, show_plot=False, suggest_funcs=None)
    d = learn.grad_stats.df
    assert set(d['phase'])=={'lr_find'} and d['iteration'].max()==6 and len(learn.grad_stats.stats)==0
    twin.grads,twin.n,spy.grads,spy.norms = {},0,[],[]
    fit(learn)
    d = learn.grad_stats.select(phase='fit').df
    assert (d['fit']==0).all()   # each phase counts its own
    check_outputs(d, twin, owner_names(learn.model))
    check_params(d, spy, learn.grad_norm.norms)
