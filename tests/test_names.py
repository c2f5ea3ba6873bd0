"""Names are text: in plots, the report, the notebook's view and files they are shown as they are, and begin no formula, tag or
comment; what is not there is not called 'not finite'."""
import html,json,re,shutil,warnings
from functools import partial
import numpy as np,pandas as pd,pytest,torch
import torch.nn.functional as F
from fastai.basics import *
from matplotlib import pyplot as plt
from torch import nn
from fastai_gradstats import GradNormCallback,GradRecord,GradStatsCallback,compare,diagnose,save_report
from fastai_gradstats import plot_grad_flow,plot_grad_heatmap,plot_grad_hist,plot_grad_log10,plot_grad_lr,plot_grad_norm,plot_ray
from fastai_gradstats.plot import printed
from helpers.callbacks import TrainOnly
from helpers.oracles import GradSpy
from helpers.project import visit_page
from helpers.training import fit,loaders

hostile = {
    'two dollars':'$\\frac$',
    'four dollars':'$x$ and $\\frac{$',
    'backslash':'a\\b\\',
    'caret':'x^_{',
    'comment':'<!--<script>',
    'end of script':'</script><b>',
    'end of comment':'--><i>',
    'ampersand':'a&lt;b&',
    'quotes':'"\'`',
    'attribute':'id="x" href="#y" url(#z)',
    'colour':'#000000',
    'underscore':'_hidden',
    'child':'_child1',
    'line breaks':'a\nb\r\n\tc',
    'long':'w'*300,
    'accents':'ünïcode',
    'right to left':'שלום',
    'direction':'a\u202eb',
    'percent':'%s %(x)d 100%',
    'braces':'{title}{0}{}',
    'empty line':' ',
    'clash':'clipped',
    'comma':'a,b;c"d'}

def named_learner(model, *cbs, **kw):
    torch.manual_seed(0)
    x,y = torch.randn(24,4),torch.randint(3, (24,))
    return Learner(loaders(x, y, 4), model, loss_func=F.cross_entropy, opt_func=SGD, lr=.1, cbs=[*cbs,TrainOnly()], **kw)

def modules_named(model_names):
    "A model with modules of these names, in this order"
    m = nn.Sequential()
    for i,n in enumerate(model_names): m.add_module(n.replace('.', '_'), nn.Linear(4 if not i else 3,3))
    return m

@pytest.fixture(scope='module')
def rec():
    "A record of a model whose modules have all the names"
    learn = fit(named_learner(modules_named(hostile.values()), GradStatsCallback(hist=True), GradNormCallback()))
    return GradRecord(learn.grad_stats.df, learn.grad_norm.df, learn.grad_norm.by('param'), hist=learn.grad_stats.record.hist_df)

@pytest.fixture(scope='module')
def small():
    "A record of a small model"
    learn = fit(named_learner(nn.Sequential(nn.Linear(4,3)), GradStatsCallback(), GradNormCallback()))
    return GradRecord(learn.grad_stats.df, learn.grad_norm.df)

def texts_drawn(ax):
    "All texts of the figure, after it was drawn and written in two formats"
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')
        ax.figure.canvas.draw()
    res = [t.get_text() for a in ax.figure.axes for t in a.findobj(plt.Text) if t.get_text()]
    plt.close(ax.figure)
    return res

def is_shown(shown, name):
    "Is the name, or the right end of a long one, among the texts?"
    name = printed(name)
    return any(name in s or len(name)>20 and name[-5:] in s for s in shown)

hostile_names = list(hostile.values())
groups = [hostile_names[i::3] for i in range(3)]
name_groups = pytest.mark.parametrize('some', groups, ids=range(3))

def test_module_names(rec):
    "Every plot of a record draws, and names the tensors as they are"
    for f in (plot_grad_log10, plot_grad_norm): texts_drawn(f(rec))
    for f in (partial(plot_grad_heatmap, figsize=(9,12)), partial(plot_grad_flow, figsize=(12,5)), partial(plot_grad_heatmap, kind='param', figsize=(9,16))):
        shown = texts_drawn(f(rec))
        for n in hostile_names:
            assert is_shown(shown, n.replace('.', '_')) or f.keywords.get('kind')=='param' and any(t.endswith('.weight') for t in shown) and len(n)>40, n

@pytest.mark.parametrize('name', hostile_names, ids=hostile)
def test_histogram_title(rec, name):
    "The title is the tensor's name; a long one keeps its right end and stays inside"
    ax = plot_grad_hist(rec, name.replace('.', '_'), figsize=(2.9,2))
    shown = ax.get_title('left')
    assert is_shown([shown], name.replace('.', '_')) and len(shown)<=max(len(printed(name)), 40)
    texts_drawn(ax)

@name_groups
def test_run_names(small, some):
    "A run of a comparison is in the legend of every plot under its name"
    both = compare({n:small for n in some})
    for f in (plot_grad_log10, plot_grad_norm, plot_grad_flow, partial(plot_grad_lr, phase='fit')):
        ax = f(both, figsize=(24,9))
        legend = [t.get_text() for t in ax.get_legend().get_texts()]
        for n in some: assert is_shown(legend, n), (f, n)
        texts_drawn(ax)
    shown = texts_drawn(plot_grad_heatmap(both, figsize=(40,3)))
    for n in some: assert is_shown(shown, n), n

@name_groups
@pytest.mark.parametrize('column', ['run','label'])
def test_ray_names(some, column):
    "A ray's lines, with their slopes"
    ray = pd.concat(pd.DataFrame({'scale':[1.,2.,4.], 'norm':np.array([1.,2.,4.])*10**i, column:n}) for i,n in enumerate(some))
    ax = plot_ray(ray, figsize=(24,9))
    legend = [t.get_text() for t in ax.get_legend().get_texts()]
    shown = texts_drawn(ax)
    for n in some: assert is_shown(legend, n) and any(s.endswith('slope 1.00') and printed(n)[-5:] in s for s in shown), n

@pytest.mark.slow
def test_statistic_names():
    "Statistics of the user's on an axis"
    learn = fit(named_learner(nn.Sequential(nn.Linear(4,3)), GradStatsCallback(extra={n:lambda g: g.abs().max() for n in hostile_names})))
    for n in hostile_names:
        for f in (plot_grad_log10, plot_grad_heatmap):
            ax = f(learn, stat=n, figsize=(2.9,1.9))
            assert is_shown([o.get_ylabel() for o in ax.figure.axes], n)
            texts_drawn(ax)

@pytest.mark.parametrize('width', [2,4,9])
def test_narrow_legend(small, width):
    "A long name is shortened, not left out"
    both = compare({'w'*300:small, '_'+'v'*300:small})
    ax = plot_grad_log10(both, figsize=(width,3))
    shown = [t.get_text() for t in ax.get_legend().get_texts()]
    assert any(s.endswith('ww') for s in shown) and any(s.endswith('vv') for s in shown)
    plt.close('all')

def test_usetex(rec):
    "Nothing is handed to LaTeX where the user draws with it"
    with plt.rc_context({'text.usetex':True}):
        ax = plot_grad_heatmap(rec)
        assert not any(t.get_usetex() or t.get_parse_math() for t in ax.get_yticklabels())
    plt.close('all')

def visible(page):
    "What stands between the tags of a page"
    body = re.sub(r'<(style|script)\b.*?</\1>', '', page, flags=re.S)
    return html.unescape(re.sub(r'<[^>]*>', '\x00', body))

@pytest.mark.parametrize('some', [groups[0], *(pytest.param(group, marks=pytest.mark.slow) for group in groups[1:])], ids=range(3))
def test_report(rec, small, some, tmp_path):
    "The page has the names as text, of modules and of runs; its data block holds no tag"
    pages = save_report(rec, tmp_path/'a.html', title=some[0]), save_report(compare({n:small for n in some}), tmp_path/'b.html')
    for f,wanted in zip(pages, (hostile_names, some)):
        page = f.read_text(encoding='utf-8')
        assert page.count('<svg')==6 and page.count('<script')==2==page.count('</script>')
        assert page.count('<!--')==page.count('-->') and page.rstrip().endswith('</html>')
        text = visible(page)
        for n in wanted:
            shown = printed(n if wanted is some else n.replace('.', '_'))
            assert f'\x00{shown}\x00' in text, n   # in a cell of the table, by itself
        data = re.search(r'<script id=data[^>]*>(.*?)</script>', page, re.S)[1]
        assert '<' not in data
        if wanted is hostile_names: assert {f"{printed(n.replace('.', '_'))} (output)" for n in hostile_names}<=set(json.loads(data)['names'])

def test_notebook_view(rec, small):
    "The notebook's display holds no tag of a name's"
    for r in (rec, compare({n:small for n in hostile_names[:8]})):
        view = r._repr_html_()
        assert view.count('<img')==1 and '<script' not in view and '<i>' not in view and '<!--' not in view

@pytest.mark.parametrize('format', ['csv','parquet'])
def test_files(format, tmp_path):
    "Names survive a folder, whatever the folder is called"
    if format=='parquet': pytest.importorskip('pyarrow')
    learn = fit(named_learner(modules_named(hostile_names), GradStatsCallback(), GradNormCallback()))
    for folder in ('$x$','[a]*','a b','ü%s{}',"it's"):
        learn.grad_stats.record.save(tmp_path/folder, format=format)
        back = GradRecord.load(tmp_path/folder)
        assert list(back.names)==list(learn.grad_stats.names)
        assert plot_grad_log10(str(tmp_path/folder)).lines
    plt.close('all')

@pytest.mark.parametrize('name', ['run','octave','norm','iteration'])
def test_reserved(name):
    "A statistic may not have the name of a column, nor of the columns that make a comparison or a histogram"
    with pytest.raises(ValueError, match=f'extra.*{name}'): GradStatsCallback(extra={name:lambda g: g.sum()})

@pytest.mark.slow
def test_browser(tmp_path):
    "Headless: the page with such names shows its three pictures, the heatmap and the table, and the console is silent"
    assert shutil.which('chromium'), 'Debian: apt-get install chromium'
    learn = fit(named_learner(modules_named(hostile_names), GradStatsCallback(), GradNormCallback()))
    f = save_report(learn, tmp_path/'a.html', title='<!--<script>')
    code = """<script>{const c=$('heat'),r=c.getBoundingClientRect(),rows=document.querySelectorAll('.sort tbody tr').length
      c.dispatchEvent(new MouseEvent('mousemove',{clientX:r.left+5,clientY:r.top+2}))
      document.title=[[...document.querySelectorAll('svg')].filter(o => o.getBoundingClientRect().width).length,c.width,rows,tip.textContent.split('\\n')[0]].join('|')}</script></html>"""
    f.write_text(f.read_text(encoding='utf-8').replace('</html>', code), encoding='utf-8')
    p = visit_page(f, tmp_path)
    assert p.returncode==0 and 'CONSOLE' not in p.stderr, p.stderr
    title = html.unescape(re.search(r'<title>(.*?)</title>', p.stdout, re.S)[1])
    assert title==f'3|6|{3*len(hostile_names)}|$\\frac$ (output)', title

# --- not there is not the same as not finite

def stepping_in_backward(model):
    for p in model.parameters():
        def f(p):
            p.data.add_(p.grad, alpha=-.01)
            p.grad = None
        p.register_post_accumulate_grad_hook(f)
    return model
class Free(nn.Module):
    "No parameter takes part"
    def __init__(self): super().__init__(); self.lin = nn.Linear(4,3)
    def forward(self, x): return x.requires_grad_()[:,:3]*2
class Zeroes(Callback):
    "Takes the gradients away before the step"
    order,run_valid = GradSpy.order-.1,False
    def before_step(self):
        for p in self.model.parameters(): p.grad = None
def relu_mlp(): return nn.Sequential(nn.Linear(4,8), nn.ReLU(), nn.Linear(8,3))
without_gradient = dict(inside_backward=lambda *cbs: named_learner(stepping_in_backward(relu_mlp()), *cbs),
                        no_part=lambda *cbs: named_learner(Free(), *cbs),
                        taken_away=lambda *cbs: named_learner(relu_mlp(), Zeroes(), *cbs))

@pytest.mark.parametrize('name', without_gradient)
def test_nothing_at_the_step(name):
    "Training without a gradient at the step is neither ok nor 'not finite'; a copy of the gradients before the step is empty, too"
    spy = GradSpy()
    learn = fit(without_gradient[name](GradStatsCallback(), GradNormCallback(), spy))
    assert spy.grads==[{}]*6 and learn.grad_norm.df['norm'].isna().all() and not learn.grad_norm.df['nonfinite'].any()
    for o in (learn, learn.grad_norm):
        f = diagnose(o)
        assert not f.ok and f.loc[f['rule']=='no_gradient', 'evidence'].item()=='no gradient is left at the step, in 6 of 6 steps'
        assert 'non_finite' not in set(f.loc[f['severity']!='not checked', 'rule'])
    assert learn.grad_norm.sentence()=='No gradient was left at the step in 6 of 6 steps.'
    with pytest.raises(ValueError, match='no gradient was left at the step in 6 steps'): learn.grad_norm.suggest_clip()
    for f in (plot_grad_norm, partial(plot_grad_lr, phase='fit')): assert 'No gradient was left at the step' in texts_drawn(f(learn))[0]

def test_outputs_alone_tell():
    "Without norms: outputs have gradients and no parameter has one"
    learn = fit(without_gradient['taken_away'](GradStatsCallback()))
    f = diagnose(learn)
    assert not f.ok and 'no gradient is left at the step in fit 0' in f.loc[f['rule']=='no_gradient', 'evidence'].item()
    only = fit(without_gradient['taken_away'](GradStatsCallback('output')))
    assert diagnose(only).ok and "kind='both'" in diagnose(only).set_index('rule').loc['no_gradient','evidence']

class ZeroesSome(Zeroes):
    def before_step(self):
        if self.iter in (1,2): super().before_step()
class NanAt(Callback):
    order,run_valid = GradSpy.order-.2,False
    def before_step(self):
        if self.iter==5: self.model[0].weight.grad[0,0] = np.nan

def test_some_there():
    "Finite, not finite and not there are told apart in sentence, plot and suggestion"
    spy = GradSpy()
    learn = fit(named_learner(relu_mlp(), ZeroesSome(), NanAt(), GradNormCallback(), spy))
    assert [bool(g) for g in spy.grads]==[True,False,False,True,True,True]
    norms = np.array(spy.norms)[[0,3,4]]
    assert learn.grad_norm.sentence()==f'Gradient norm {np.median(norms):.2g} (median of 3 finite of 6 steps), largest {norms.max():.2g}, not finite in 1, no gradient left in 2.'
    assert diagnose(learn).set_index('rule').loc['no_gradient','severity']=='note'
    with pytest.warns(UserWarning, match='1 of 4 norms'): assert learn.grad_norm.suggest_clip(1.).left_out==1
    ax = plot_grad_norm(learn)
    assert '1 not finite, 2 without a gradient, of 6 steps' in [l for l in ax.lines if l.get_gid()=='line'][0].get_label()
    assert [l for l in ax.lines if l.get_gid()=='not finite'][0].get_xdata().tolist()==[5]
    plt.close('all')

class NanAfterBackward(Callback):
    "What another rank would do: gradients of these parameters are NaN, and nothing else is"
    order,run_valid = GradSpy.order-.2,False
    def __init__(self, names): self.names = names
    def before_step(self):
        if self.iter==2:
            for n,p in self.model.named_parameters():
                if n in self.names: p.grad.fill_(np.nan)

@pytest.mark.parametrize('names,before',
                         [(('0.weight','0.bias','2.weight','2.bias'),'(parameters)'), (('0.weight','2.bias'),'(parameters)'),
                          (('2.weight',),'2.weight'), (('0.bias',),'0.bias')])
def test_after_backward(names, before):
    "All outputs finite, parameters not: no layer is blamed, the reader is sent to the other ranks and to what acts after backward"
    learn = fit(named_learner(relu_mlp(), NanAfterBackward(names), GradStatsCallback(), GradNormCallback()))
    n = learn.grad_stats.first_nonfinite()
    assert n==(2, '(outputs)', before) and n.where=='after backward'
    for s in (repr(n), str(diagnose(learn)).replace('\n    ', ' ')):
        assert 'outputs of this process are finite' in s and 'other ranks' in s and 'after backward' in s
    assert 'lower the learning rate' not in str(diagnose(learn).query("rule=='non_finite'")['try'].item()) and not diagnose(learn).ok

def test_unseen_output():
    "Where the module has no output on record, it may be there: backward, as before"
    learn = fit(named_learner(relu_mlp(), NanAfterBackward(('0.weight',)), GradStatsCallback(include='2$|weight')))
    assert learn.grad_stats.first_nonfinite().where=='backward'

# --- numpy's numbers

@pytest.mark.parametrize('i', [np.int64(3),np.int32(3),np.uint8(3),np.int16(-1)], ids=repr)
def test_numpy_integers(small, i):
    "Whole numbers of numpy where a whole number is meant"
    a,b = (plot_grad_flow(small, iteration=o) for o in (i,int(i)))
    assert a.get_title('left')==b.get_title('left') and all(np.array_equal(x.get_ydata(), y.get_ydata(), equal_nan=True) for x,y in zip(a.lines, b.lines))
    if i>0: assert small.top(i).equals(small.top(int(i))) and small.summary(i)==small.summary(int(i))
    assert small.suggest_clip(np.float32(.5))==small.suggest_clip(.5) and diagnose(small, window=np.int64(9), dead=np.float32(.4)).equals(diagnose(small, window=9, dead=.4))
    plt.close('all')
