"Pages name tests that exist, numbers that were printed, options as they are, and lines that run."
import ast,inspect,json,re
import pytest
from fastai.callback.training import GradientClip
from fastai.optimizer import SGD
from torch import nn
import fastai_gradstats.all as everything
from fastai_gradstats.demo import digits_learner
from helpers.project import ROOT,notebook_cells

PAGE = 'nbs/when_right.ipynb'
def markdown_of(nb): return '\n'.join(''.join(c['source']) for c in json.loads((ROOT/nb).read_text(encoding='utf-8'))['cells'] if c['cell_type']=='markdown')
def named_tests(s): return re.findall(r'(tests/\w+\.py)::(?:<wbr>)?(\w+)', s)

def table_rows():
    "Rows of the page's tables, without their headers"
    lines = markdown_of(PAGE).splitlines()
    def is_rule(line): return re.fullmatch(r'[|:\- ]+', line)
    return [l for l,after in zip(lines, lines[1:]+['']) if l.startswith('|') and not is_rule(l) and not is_rule(after or 'x')]

def test_every_row_names_a_test():
    assert len(table_rows())>=20
    for r in table_rows():
        assert r.count('|')==4, f'three columns: {r}'
        assert named_tests(r.split('|')[3]), f'no test is named: {r}'

@pytest.mark.parametrize('file,name', sorted(set(named_tests(markdown_of(PAGE)))))
def test_named_test_exists(file, name):
    assert re.search(rf'^def {name}\(', (ROOT/file).read_text(encoding='utf-8'), re.M), f'{PAGE} names {file}::{name}'

TUTORIALS = 'nbs/tutorials/'
def numbers_printed(nb):
    "Numbers in the saved outputs"
    out = [''.join(o.get('text') or o['data'].get('text/plain', '')) for c in notebook_cells(nb) for o in c.get('outputs', [])]
    return [float(n) for n in re.findall(r'-?\d+\.?\d*(?:e[+-]?\d+)?', '\n'.join(out))]

def thread_answers():
    "Rows of the thread's table: (answer, pages named)"
    rs = [l.split('|')[2:4] for l in markdown_of(TUTORIALS+'01_less_than_one.ipynb').splitlines() if re.match(r'\| \*', l)]
    return [(a, re.findall(r'\((\w+\.ipynb)\)', w)+['01_less_than_one.ipynb']*('this page' in w)) for a,w in rs]

@pytest.mark.parametrize('answer,pages', thread_answers())
def test_answers_are_measured(answer, pages):
    "Each decimal number of an answer is printed on a page that the row names"
    have = [n for p in pages for n in numbers_printed(TUTORIALS+p)]
    said = re.findall(r'-?\d+\.\d+(?:e[+-]?\d+)?', answer)
    assert said and pages
    for s in said:
        digits = len(s.split('e')[0].split('.')[1])
        assert any(f'{n:.{digits}{"e" if "e" in s else "f"}}'==s for n in have), f'{s} is not printed in {pages}'

OPTIONS = dict(GradStatsCallback='04_callback', GradNormCallback='04_callback', GradRecorder='03d_recorder', GradAlert='08c_alert',
               diagnose='06_diagnosis', grad_diff='06a_differ', save_report='07_report')

def option_rows(name):
    "Name and default of each row of an option table"
    lines = markdown_of(f'nbs/{OPTIONS[name]}.ipynb').splitlines()
    rows = []
    for line in lines[lines.index(f'| `{name}` | default | meaning |')+2:]:
        if not line.startswith('|'): return rows
        names,default,_ = [cell.strip() for cell in line.strip('|').split('|')]
        rows += [(o,default) for o in re.findall(r'`(\w+)`', names)]

def default_of(parameter):
    "As a table spells it"
    value = parameter.default
    if value is inspect.Parameter.empty: return ''
    return f'{value:,}' if type(value) is int else f'{value:g}.' if type(value) is float else repr(value)

@pytest.mark.parametrize('name', OPTIONS)
def test_option_tables(name):
    "Each argument has a row with its default, and no row is of another"
    parameters = inspect.signature(getattr(everything, name)).parameters.values()
    want = {p.name:default_of(p) for p in parameters if p.kind is not p.VAR_KEYWORD}
    assert dict(option_rows(name))==want

def task_lines():
    "The code of the index of tasks, one cell of a table each"
    rows = [l for l in markdown_of('nbs/tasks.ipynb').splitlines() if l.startswith('|')]
    cells = [row.strip('|').split('|')[1] for row in rows]
    return [line for cell in cells for line in re.findall(r'`([^`]+)`', cell) if ('(' in line or '[' in line) and line!='f(incident)']

@pytest.fixture(scope='module')
def task_names(tmp_path_factory):
    "What the lines name: Learners that trained, and everything that `all` brings"
    def trained():
        net = nn.Sequential(nn.Flatten(), nn.Linear(64,16), nn.ReLU(), nn.Linear(16,10))
        learn = digits_learner(net, opt_func=SGD, lr=.1, cbs=[everything.GradStatsCallback(), everything.GradNormCallback(), everything.GradAlert()])
        picture,label = learn.dls.train_ds[900]
        learn.dls.train_ds[900] = picture*1000,(label+1)%10   # an incident
        with learn.no_bar(), learn.no_logging(): learn.fit(3)
        return learn
    learn = trained()
    with learn.no_bar(), learn.no_logging(): learn.lr_find(show_plot=False, num_it=12)
    return dict(vars(everything), GradientClip=GradientClip, learn=learn, learn_a=learn, learn_b=trained(), f=print, name='1', model=learn.model, opt=None)

@pytest.mark.parametrize('line', task_lines())
def test_lines_of_the_index(line, task_names, tmp_path, monkeypatch):
    "They run as they stand; for those that need another package, their names are there"
    monkeypatch.chdir(tmp_path)
    if line.startswith('with '): line += ' pass'
    tree = ast.parse(line)
    asked = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    if asked & {'GradTrainerCallback','GradLightningCallback'}:
        from fastai_gradstats import loops
        assert all(getattr(loops, name) for name in asked)
        return
    if any(word in line for word in ("'wandb'","'tensorboard'","add_cb")):
        assert asked<={*task_names}
        return
    exec(compile(tree, line, 'exec'), dict(task_names))
