"What a plot or a report draws of several fits and kinds: (phase, fit, iteration) is the key, `fit` and `kind` pick, and what was not recorded is said by name."
import base64,json,re

import numpy as np,pandas as pd,pytest
from matplotlib import pyplot as plt

from fastai_gradstats import (GradNormCallback,GradRecord,GradStatsCallback,compare,plot_grad_flow,plot_grad_heatmap,plot_grad_hist,
                              plot_grad_log10,plot_grad_lr,plot_grad_norm,save_report)
from fastai_gradstats.record import NotRecorded

TENSOR_PLOTS = plot_grad_log10,plot_grad_heatmap,plot_grad_flow
NORM_PLOTS = plot_grad_norm,plot_grad_lr

@pytest.fixture(autouse=True)
def no_figure_stays():
    yield
    plt.close('all')

def tensors_of_fits(size, n, phase='fit', fit=0, first=0, kind='output', name='a'):
    "`n` iterations of one tensor whose gradient is `size`"
    it = np.arange(n)+first
    df = pd.DataFrame(dict(fit=fit, phase=phase, epoch=0, iteration=it, step=it, kind=kind, name=name, out=0, call=0, numel=10))
    return df.assign(max_abs=size, mean_abs=size/2, norm=size, mean=0., std=size, zeros=0, nonfinite=0, above=0, skipped=False)

def steps_of_fits(norm, n, phase='fit', fit=0, first=0):
    it = np.arange(n)+first
    df = pd.DataFrame(dict(fit=fit, phase=phase, epoch=0, iteration=it, step=it, lr=.1, loss=1., bs=8))
    return df.assign(norm=norm, clip_coef=1., clipped_norm=norm, weight_norm=1., nonfinite=0, skipped=False)

@pytest.fixture
def three_fits():
    "A fit (gradient 1), an lr_find (100), a second fit (10); each phase counts its fits from 0"
    fits = dict(size=1., n=5),dict(size=100., n=7, phase='lr_find'),dict(size=10., n=3, fit=1, first=5)
    norms = [steps_of_fits(f['size'], *[f['n']], **{k:v for k,v in f.items() if k not in ('size','n')}) for f in fits]
    return GradRecord(pd.concat([tensors_of_fits(**f) for f in fits]), pd.concat(norms))

def line(ax): return next(l for l in ax.lines if l.get_gid()=='line').get_ydata().tolist()
def marks(ax): return [t.get_text() for t in ax.texts if t.get_gid()=='mark']

def test_all_phases_in_order_of_training(three_fits):
    "`lr_find` 0 stands between fit 0 and fit 1, and is not taken for fit 0"
    ax = plot_grad_log10(three_fits, phase=None)
    assert line(ax)==[0]*5+[2]*7+[1]*3 and marks(ax)==['fit 0','lr_find','fit 1']
    assert plot_grad_heatmap(three_fits, phase=None).images[0].get_array().tolist()==[[0]*5+[2]*7+[1]*3]
    ax = plot_grad_norm(three_fits, phase=None)
    assert line(ax)==[1]*5+[100]*7+[10]*3 and marks(ax)==['fit 0','lr_find','fit 1']

def test_all_phases_of_several_runs(three_fits):
    ax = plot_grad_heatmap(compare(dict(x=three_fits, y=three_fits)), phase=None)
    assert ax.images[0].get_array().tolist()==[([0]*5+[2]*7+[1]*3)*2] and marks(ax)==['x','lr_find','fit 1','y','lr_find','fit 1']

@pytest.mark.parametrize('fit,want', [(0,[1]*5), (1,[10]*3), ([1,0],[1]*5+[10]*3), (np.int64(1),[10]*3), (None,[1]*5+[10]*3)], ids=str)
def test_fit(three_fits, fit, want):
    assert line(plot_grad_norm(three_fits, fit=fit))==want
    assert line(plot_grad_log10(three_fits, fit=fit))==np.log10(want).tolist()
    assert plot_grad_heatmap(three_fits, fit=fit).images[0].get_array().tolist()==[np.log10(want).tolist()]
    assert line(plot_grad_flow(three_fits, fit=fit))==want[-1:]

def test_fit_of_a_phase(three_fits):
    "A number means that fit of the phase that is drawn; with all phases, that fit of each"
    assert line(plot_grad_log10(three_fits, phase='lr_find', fit=0))==[2]*7
    assert line(plot_grad_log10(three_fits, phase=None, fit=0))==[0]*5+[2]*7
    assert line(plot_grad_flow(three_fits, 2, phase=None))==[100]     # the last fit that has iteration 2
    assert line(plot_grad_flow(three_fits, phase=None))==[10]
    assert line(plot_grad_lr(three_fits))==[100]*7 and line(plot_grad_lr(three_fits, phase=None))==[10]*3 and line(plot_grad_lr(three_fits, 'fit', 0))==[1]*5

def test_fit_that_is_not_there(three_fits, tmp_path):
    for plot in TENSOR_PLOTS:
        with pytest.raises(ValueError, match="fit: accepted are those recorded in phase 'fit', between 0 and 1.*got 2"): plot(three_fits, fit=[1,2])
    for plot in NORM_PLOTS:
        with pytest.raises(ValueError, match="in phase 'lr_find', between 0 and 0"): plot(three_fits, phase='lr_find', fit=1)
    with pytest.raises(ValueError, match='between 0 and 1'): save_report(three_fits, tmp_path/'a.html', fit=2)
    assert not plt.get_fignums()

def test_report_of_a_fit(three_fits, tmp_path):
    page = save_report(three_fits, tmp_path/'a.html', fit=1).read_text(encoding='utf-8')
    data = json.loads(re.search('<script id=data[^>]*>(.*?)</script>', page)[1])
    assert np.frombuffer(base64.b64decode(data['v']), '<f4').tolist()==[10]*3 and (data['lo'][0], data['hi'][-1])==(5,7)
    assert 'Largest output gradient 10 at iteration 5' in page

@pytest.mark.parametrize('plot', TENSOR_PLOTS)
def test_kind(plot, three_fits):
    "'both' draws both; a kind that was not recorded is an error that says who records it"
    both = GradRecord(pd.concat([tensors_of_fits(1., 5), tensors_of_fits(2., 5, kind='param', name='a.weight')]))
    drawn = [l.get_label() for l in plot(both, kind='both').lines if l.get_gid()=='line']
    if plot is plot_grad_heatmap: assert len(plot(both).images[0].get_array())==2
    else: assert [any(what in label for label in drawn) for what in ('outputs','parameters')]==[True]*2
    with pytest.raises(NotRecorded, match=r"GradStatsCallback\(kind='both'\) records them"): plot(three_fits, kind='param')
    with pytest.raises(ValueError, match="kind: accepted are 'output', 'param', 'both'"): plot(three_fits, kind='weights')

def test_what_was_not_recorded(three_fits):
    only_steps,only_tensors = GradRecord(steps=three_fits.steps),GradRecord(three_fits.df)
    for plot in TENSOR_PLOTS:
        with pytest.raises(NotRecorded, match=r'GradStatsCallback\(\) records them'): plot(only_steps)
    for plot in NORM_PLOTS:
        with pytest.raises(NotRecorded, match=r'GradNormCallback\(\) records them'): plot(only_tensors)
    with pytest.raises(NotRecorded, match='hist=True'): plot_grad_hist(three_fits, 'a')
    for plot in (*TENSOR_PLOTS, *NORM_PLOTS): plot(GradRecord())   # nothing yet: the picture says so

def test_list_of_callbacks(tmp_path):
    "As a Learner's: tensors from one, norms from the other. Nothing recorded yet is no error"
    cbs = [GradStatsCallback(),GradNormCallback()]
    for plot in (*TENSOR_PLOTS, *NORM_PLOTS): plot(cbs)
    assert 'Nothing recorded yet' in save_report(cbs, tmp_path/'a.html').read_text(encoding='utf-8')
