"Names are text: in plots, the report, the notebook's view and files they are shown as they are, and begin no formula, tag or comment; what is not there is not called 'not finite'."
import html,json,re,shutil,subprocess,warnings
from functools import partial
import numpy as np,pandas as pd,pytest,torch
import torch.nn.functional as F
from fastai.basics import *
from matplotlib import pyplot as plt
from torch import nn

from fastai_gradstats import GradNormCallback,GradRecord,GradStatsCallback,compare,diagnose,plot_grad_flow,plot_grad_heatmap,plot_grad_hist,plot_grad_log10,plot_grad_lr,plot_grad_norm,plot_ray,save_report
from fastai_gradstats.plot import printed
from oracles import Spy,TrainOnly,fit,loaders

del test,test_close,test_eq,test_eq_type,test_fail,test_fig_exists,test_is,test_ne,test_set,test_shuffled,test_sig,test_stdout,test_warns   # fastcore's

hostile = {'two dollars':'$\\frac$', 'four dollars':'$x$ and $\\frac{$', 'backslash':'a\\b\\', 'caret':'x^_{', 'comment':'<!--<script>', 'end of script':'</script><b>', 'end of comment':'--><i>', 'ampersand':'a&lt;b&', 'quotes':'"\'`',
           'attribute':'id="x" href="#y" url(#z)', 'colour':'#000000', 'underscore':'_hidden', 'child':'_child1', 'line breaks':'a\nb\r\n\tc', 'long':'w'*300, 'accents':'ünïcode', 'right to left':'שלום', 'direction':'a\u202eb',
           'percent':'%s %(x)d 100%', 'braces':'{title}{0}{}', 'surrogate':'a\ud800b', 'empty line':' ', 'clash':'clipped', 'comma':'a,b;c"d'}
files = [n for k,n in hostile.items() if k!='surrogate']   # half a character cannot be written as UTF-8

def learner(model, *cbs, **kw):
    torch.manual_seed(0)
    x,y = torch.randn(24,4),torch.randint(3, (24,))
    return Learner(loaders(x, y, 4), model, loss_func=F.cross_entropy, opt_func=SGD, lr=.1, cbs=[*cbs,TrainOnly()], **kw)

def record(name, **kw):
    "A record with a module of this name"
    m = nn.Sequential()
    m.add_module(name.replace('.', '_'), nn.Linear(4,8))
    m.add_module('end', nn.Linear(8,3))
    learn = fit(learner(m, GradStatsCallback(hist=True, **kw), GradNormCallback()))
    return GradRecord(learn.grad_stats.df, learn.grad_norm.df, learn.grad_norm.by('param'), hist=learn.grad_stats.record.hist_df)

@pytest.fixture(scope='module')
def made():
    "One record for each name, made once"
    return {k:record(n) for k,n in hostile.items()}

def drawn(ax):
    "All texts of the figure, after it was drawn and written in two formats"
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')
        ax.figure.canvas.draw()
        ax.figure.savefig(io.BytesIO(), format='svg')
    res = [t.get_text() for a in ax.figure.axes for t in a.findobj(plt.Text) if t.get_text()]
    plt.close(ax.figure)
    return res

def ends(shown, name):
    "Is the name, or the right end of a long one, among the texts?"
    name = printed(name)
    return any(name in s or len(name)>20 and name[-5:] in s for s in shown)

each = pytest.mark.parametrize('key', hostile)

@each
def test_module_name(made, key):
    "Every plot of a record draws, and names the tensor as it is"
    rec,name = made[key],hostile[key]
    for f in (plot_grad_log10, plot_grad_norm, plot_grad_lr): drawn(f(rec))
    for f in (plot_grad_heatmap, plot_grad_flow, partial(plot_grad_heatmap, kind='param'), partial(plot_grad_hist, name=name)): assert ends(drawn(f(rec)), name)

@each
def test_run_name(made, key):
    "A run of a comparison is in the legend and in the marks of every plot under its name"
    name = hostile[key]
    both = compare({name:made['accents'], 'other':made['percent']})
    for f in (plot_grad_log10, plot_grad_norm, plot_grad_lr, plot_grad_flow, plot_grad_heatmap):
        ax = f(both, **(dict(phase='fit') if f is plot_grad_lr else {}))
        if f is not plot_grad_heatmap: assert ends([t.get_text() for t in ax.get_legend().get_texts()], name)
        assert ends(drawn(ax), name)
    ray = pd.DataFrame(dict(scale=[1.,2.,4.]*2, norm=[1.,2.,4.]*2, run=[name]*3+['other']*3))
    for frame in (ray, ray.rename(columns={'run':'label'})):
        ax = plot_ray(frame)
        assert ends([t.get_text() for t in ax.get_legend().get_texts()], name) and ends(drawn(ax), f'{name} slope 1.00')

@pytest.mark.parametrize('key', [k for k,n in hostile.items() if k not in ('surrogate',)])
def test_statistic_name(key):
    "A statistic of the user's on an axis"
    name = hostile[key]
    learn = fit(learner(nn.Sequential(nn.Linear(4,3)), GradStatsCallback(extra={name:lambda g: g.abs().max()})))
    for f in (plot_grad_log10, plot_grad_heatmap): assert ends(drawn(f(learn, stat=name)), name)

@pytest.mark.parametrize('width', [2,4,9])
def test_narrow_legend(made, width):
    "A long name is shortened, not left out"
    both = compare({'w'*300:made['accents'], '_'+'v'*300:made['percent']})
    ax = plot_grad_log10(both, figsize=(width,3))
    shown = [t.get_text() for t in ax.get_legend().get_texts()]
    assert any(s.endswith('ww') for s in shown) and any(s.endswith('vv') for s in shown)
    plt.close('all')

def test_usetex(made):
    "Nothing is handed to LaTeX where the user draws with it"
    with plt.rc_context({'text.usetex':True}):
        ax = plot_grad_heatmap(made['two dollars'])
        assert not any(t.get_usetex() or t.get_parse_math() for t in ax.get_yticklabels())
    plt.close('all')

def visible(page):
    "What stands between the tags of a page"
    body = re.sub(r'<(style|script)\b.*?</\1>', '', page, flags=re.S)
    return html.unescape(re.sub(r'<[^>]*>', '\x00', body))

@each
def test_report(made, key, tmp_path):
    "The page has the name as text, as module, run and title; its data block holds no tag"
    name = hostile[key]
    for rec in (made[key], compare({name:made[key], 'other':made['accents']})):
        page = save_report(rec, tmp_path/'a.html', title=name).read_text(encoding='utf-8')
        assert page.count('<svg')==2 and page.count('<script')==2==page.count('</script>') and page.count('<!--')==page.count('-->') and page.rstrip().endswith('</html>')
        text = visible(page)
        assert f'\x00{printed(name).strip()}\x00' in text.replace(f' {printed(name)}', printed(name)) or not name.strip()   # in a cell of the table, by itself
        data = re.search(r'<script id=data[^>]*>(.*?)</script>', page, re.S)[1]
        assert '<' not in data
        assert any(n.startswith(printed(name).replace('.', '_')[:20]) for n in json.loads(data)['names'])
        view = rec._repr_html_()
        assert view.count('<img')==1 and '<script' not in view and '<i>' not in view and '<!--' not in view

@pytest.mark.parametrize('format', ['csv','parquet'])
def test_files(format, tmp_path):
    "Names survive a folder, whatever the folder is called"
    if format=='parquet': pytest.importorskip('pyarrow')
    m = nn.Sequential()
    for i,n in enumerate(files): m.add_module(n.replace('.', '_') or 'x', nn.Linear(4 if not i else 3,3))
    learn = fit(learner(m, GradStatsCallback(), GradNormCallback()))
    for folder in ('$x$','[a]*','a b','ü%s{}',"it's"):
        learn.grad_stats.record.save(tmp_path/folder, format=format)
        back = GradRecord.load(tmp_path/folder)
        assert list(back.names)==list(learn.grad_stats.names)
        drawn(plot_grad_log10(str(tmp_path/folder)))

@pytest.mark.parametrize('name', ['run','octave','norm','iteration'])
def test_reserved(name):
    "A statistic may not have the name of a column, nor of the columns that make a comparison or a histogram"
    with pytest.raises(ValueError, match=f'extra.*{name}'): GradStatsCallback(extra={name:lambda g: g.sum()})

@pytest.mark.slow
def test_browser(tmp_path):
    "Headless: the page with such names has both pictures, the heatmap and the table, and the console is silent"
    assert shutil.which('chromium'), 'Debian: apt-get install chromium'
    m = nn.Sequential()
    for i,n in enumerate(hostile.values()): m.add_module(n.replace('.', '_'), nn.Linear(4 if not i else 3,3))
    learn = fit(learner(m, GradStatsCallback(), GradNormCallback()))
    f = save_report(learn, tmp_path/'a.html', title='<!--<script>')
    f.write_text(f.read_text(encoding='utf-8').replace('</html>', """<script>{const c=$('heat'),r=c.getBoundingClientRect(), rows=document.querySelectorAll('.sort tbody tr').length
      c.dispatchEvent(new MouseEvent('mousemove',{clientX:r.left+5,clientY:r.top+2}))
      document.title=[document.querySelectorAll('svg').length,c.width,rows,tip.textContent.split('\\n')[0]].join('|')}</script></html>"""), encoding='utf-8')
    p = subprocess.run(['chromium', *'--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split(), f'--user-data-dir={tmp_path}/profile',
                        *'--enable-logging=stderr --v=0 --virtual-time-budget=3000 --dump-dom'.split(), f.as_uri()], capture_output=True, text=True, timeout=120)
    assert p.returncode==0 and 'CONSOLE' not in p.stderr, p.stderr
    title = html.unescape(re.search(r'<title>(.*?)</title>', p.stdout, re.S)[1])
    assert title==f'2|6|{3*len(hostile)}|$\\frac$ (output)', title

# --- not there is not the same as not finite

def step_in_backward(model):
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
    order,run_valid = Spy.order-.1,False
    def before_step(self):
        for p in self.model.parameters(): p.grad = None
def mlp(): return nn.Sequential(nn.Linear(4,8), nn.ReLU(), nn.Linear(8,3))
gone = dict(inside_backward=lambda *cbs: learner(step_in_backward(mlp()), *cbs), no_part=lambda *cbs: learner(Free(), *cbs), taken_away=lambda *cbs: learner(mlp(), Zeroes(), *cbs))

@pytest.mark.parametrize('name', gone)
def test_nothing_at_the_step(name):
    "Training without a gradient at the step is neither ok nor 'not finite'; a copy of the gradients before the step is empty, too"
    spy = Spy()
    learn = fit(gone[name](GradStatsCallback(), GradNormCallback(), spy))
    assert spy.grads==[{}]*6 and learn.grad_norm.df['norm'].isna().all() and not learn.grad_norm.df['nonfinite'].any()
    for o in (learn, learn.grad_norm):
        f = diagnose(o)
        assert not f.ok and f.loc[f['rule']=='no_gradient', 'evidence'].item()=='no gradient is left at the step, in 6 of 6 steps'
        assert 'non_finite' not in set(f.loc[f['severity']!='not checked', 'rule'])
    assert learn.grad_norm.sentence()=='No gradient was left at the step in 6 of 6 steps.'
    with pytest.raises(ValueError, match='no gradient was left at the step in 6 steps'): learn.grad_norm.suggest_clip()
    for f in (plot_grad_norm, partial(plot_grad_lr, phase='fit')): assert 'No gradient was left at the step' in drawn(f(learn))[0]

def test_outputs_alone_tell():
    "Without norms: outputs have gradients and no parameter has one"
    learn = fit(gone['taken_away'](GradStatsCallback()))
    f = diagnose(learn)
    assert not f.ok and 'no gradient is left at the step in fit 0' in f.loc[f['rule']=='no_gradient', 'evidence'].item()
    only = fit(gone['taken_away'](GradStatsCallback('output')))
    assert diagnose(only).ok and "kind='both'" in diagnose(only).set_index('rule').loc['no_gradient','evidence']

class ZeroesSome(Zeroes):
    def before_step(self):
        if self.iter in (1,2): super().before_step()
class NanAt(Callback):
    order,run_valid = Spy.order-.2,False
    def before_step(self):
        if self.iter==4: self.model[0].weight.grad[0,0] = np.nan

def test_some_there():
    "Finite, not finite and not there are told apart in sentence, plot and suggestion"
    spy = Spy()
    learn = fit(learner(mlp(), ZeroesSome(), NanAt(), GradNormCallback(), spy))
    assert [bool(g) for g in spy.grads]==[True,False,False,True,True,True]
    norms = np.array(spy.norms)[[0,3,5]]
    assert learn.grad_norm.sentence()==f'Gradient norm {np.median(norms):.2g} (median of 3 finite of 6 steps), largest {norms.max():.2g}, not finite in 1, no gradient left in 2.'
    assert diagnose(learn).set_index('rule').loc['no_gradient','severity']=='note'
    with pytest.warns(UserWarning, match='1 of 4 norms'): assert learn.grad_norm.suggest_clip(1.).left_out==1
    ax = plot_grad_norm(learn)
    assert '1 not finite, 2 without a gradient, of 6 steps' in [l for l in ax.lines if l.get_gid()=='line'][0].get_label()
    assert [l for l in ax.lines if l.get_gid()=='not finite'][0].get_xdata().tolist()==[4]
    plt.close('all')

class After(Callback):
    "What another rank would do: gradients of these parameters are NaN, and nothing else is"
    order,run_valid = Spy.order-.2,False
    def __init__(self, names): self.names = names
    def before_step(self):
        if self.iter==2:
            for n,p in self.model.named_parameters():
                if n in self.names: p.grad.fill_(np.nan)

@pytest.mark.parametrize('names,before', [(('0.weight','0.bias','2.weight','2.bias'),'(parameters)'), (('0.weight','2.bias'),'(parameters)'), (('2.weight',),'2.weight'), (('0.bias',),'0.bias')])
def test_after_backward(names, before):
    "All outputs finite, parameters not: no layer is blamed, the reader is sent to the other ranks and to what acts after backward"
    learn = fit(learner(mlp(), After(names), GradStatsCallback(), GradNormCallback()))
    n = learn.grad_stats.first_nonfinite()
    assert n==(2, '(outputs)', before) and n.where=='after backward'
    for s in (repr(n), str(diagnose(learn)).replace('\n    ', ' ')): assert 'outputs of this process are finite' in s and 'other ranks' in s and 'after backward' in s
    assert 'lower the learning rate' not in str(diagnose(learn).query("rule=='non_finite'")['try'].item()) and not diagnose(learn).ok

def test_unseen_output():
    "Where the module has no output on record, it may be there: backward, as before"
    learn = fit(learner(mlp(), After(('0.weight',)), GradStatsCallback(include='2$|weight')))
    assert learn.grad_stats.first_nonfinite().where=='backward'

# --- numpy's numbers

@pytest.mark.parametrize('i', [np.int64(3),np.int32(3),np.uint8(3),np.int16(-1)], ids=repr)
def test_numpy_integers(made, i):
    "Whole numbers of numpy where a whole number is meant"
    rec = made['accents']
    a,b = (plot_grad_flow(rec, iteration=o) for o in (i,int(i)))
    assert a.get_title('left')==b.get_title('left') and all(np.array_equal(x.get_ydata(), y.get_ydata(), equal_nan=True) for x,y in zip(a.lines, b.lines))
    if i>0: assert rec.top(i).equals(rec.top(int(i))) and rec.summary(i)==rec.summary(int(i))
    assert rec.suggest_clip(np.float32(.5))==rec.suggest_clip(.5) and diagnose(rec, window=np.int64(9), dead=np.float32(.4)).equals(diagnose(rec, window=9, dead=.4))
    plt.close('all')
