"Live views: the picture in a notebook's cell, and the page that follows a folder. Training does not notice either."
import base64,pickle,random,re,signal,subprocess,sys,time
from types import SimpleNamespace
import pytest
import matplotlib.pyplot as plt
import matplotlib.figure as mpl_figure   # `Figure` is another thing to fastai
from fastai.basics import *
from fastai.callback.schedule import *
from fastai_gradstats import GradNormCallback,GradRecord,GradStatsCallback,plot_grad_heatmap,plot_grad_norm
from fastai_gradstats import live,report
from fastai_gradstats.engine import Engine
from helpers.project import ROOT,visit_page
from helpers.training import fit,seeded_mlp,step_learner,vector_batches,warned

def suptitle(fig): return fig._suptitle.get_text() if fig._suptitle else ''   # `get_suptitle` came with matplotlib 3.8

class HandedClock:
    "Time that passes when a test says so"
    now = 0.
    def __call__(self): return self.now

class CellOfTest:
    "Keeps what it is shown; a picture costs `cost` seconds"
    def __init__(self, clock, cost):
        self.clock = clock
        self.cost = cost
        self.shown = []   # (when it was there, width and height, the picture)
        self.ends = None
    def at_end(self, f): self.ends = f
    def leave(self): self.ends = None
    def show(self, png, width, height):
        self.clock.now += self.cost
        self.shown.append((self.clock.now,(width,height),png))

class BatchTakes(Callback):
    "Time passes in training"
    def __init__(self, clock, seconds): store_attr()
    def after_batch(self): self.clock.now += self.seconds

def blank(sources, *args):
    "A picture without a drawing, of what would be in one"
    return mpl_figure.Figure(figsize=(1,1)) if any(len(source.record().frame(table)) for source in sources for table in ('tensors','steps')) else None

@pytest.fixture
def notebook(monkeypatch):
    "A function: from then on there is a notebook, with this clock, in which a picture costs so much (a blank one, where nobody looks); returns the cells that views opened"
    def begin(clock=None, cost=.5, draw=blank):
        clock = clock or HandedClock()
        monkeypatch.setattr(live, 'draw', draw)
        cells = []
        make = live.LiveView
        def view(sources, seconds):
            cells.append(CellOfTest(clock, cost))
            return make(sources, seconds, cells[-1], clock)
        monkeypatch.setattr(live, 'LiveView', view)
        monkeypatch.setattr(live, 'in_notebook', lambda: True)
        return cells
    return begin

def helpers_on(learn): return [type(c).__name__ for c in learn.cbs if type(c).__name__=='_Live']

# --- when

def test_drawing_has_a_budget(notebook):
    "Of 100 seconds of training, pictures of 1 second take one in twenty, and each waits for its time, but for the second"
    clock = HandedClock()
    cells = notebook(clock, cost=1.)
    learn = step_learner([GradNormCallback(live=True), BatchTakes(clock, 2.)], dls=vector_batches(50, bs=2))
    fit(learn)
    times = [when for when,_,_ in cells[0].shown]
    second,*gaps = np.diff(times)[:-1]   # the last picture is drawn when the fit is over
    gaps = np.array(gaps)
    assert second==3 and (gaps>=20).all() and (gaps<=21).all() and len(times)==7

def test_seconds_are_the_least(notebook):
    "A picture that costs nothing comes as often as asked for, no more often"
    clock = HandedClock()
    cells = notebook(clock, cost=0.)
    fit(step_learner([GradNormCallback(live=5), BatchTakes(clock, 1.)], dls=vector_batches(30, bs=2)))
    assert np.diff([when for when,_,_ in cells[0].shown])[:-1].tolist()==[5.]*5

def test_pace_counts_what_fails():
    clock = HandedClock()
    pace = live.Pace(1., clock=clock)
    with pace.work(): clock.now += 2
    assert pace.wait()==1   # the first time counts for nothing
    with pytest.raises(ZeroDivisionError), pace.work():
        clock.now += 2
        1/0
    assert pace.wait()==38

# --- what

real_draw = live.draw

class Drawn(list):
    "Draws, and keeps of each figure what axes it has and its title"
    def __call__(self, *args):
        fig = real_draw(*args)
        axes = [ax for ax in fig.axes if ax.get_label()!='<colorbar>']
        self.append((['norm' if ax.get_ylabel().startswith('gradient norm') else 'heatmap' for ax in axes], suptitle(fig)))
        fig.clear()   # saving it would take longest
        return fig

@pytest.mark.parametrize('cbs,want', [((True,False),['heatmap']), ((False,True),['norm']), ((True,True),['heatmap','norm'])])
def test_what_asks_is_drawn(notebook, cbs, want):
    "One picture of all that ask"
    cells = notebook(draw=(found := Drawn()))
    stats,norms = cbs
    fit(step_learner([GradStatsCallback(live=stats), GradNormCallback(live=norms)]))
    assert found==[(want,'Sequential, SGD, fit 0')] and len(cells)==1

def test_of_each_fit_its_own(notebook):
    "A callback that came later counts its fits from 0: each is asked for its own. What `lr_find` does is not drawn"
    cells = notebook(draw=(found := Drawn()))
    learn = step_learner([GradStatsCallback(live=True)])
    fit(learn)
    learn.add_cb(GradNormCallback(live=True))
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None)
    fit(learn)
    assert [axes for axes,_ in found]==[['heatmap'],['heatmap','norm']] and len(cells)==2
    assert learn.grad_norm.df['fit'].iloc[-1]==0 and learn.grad_stats.df['fit'].iloc[-1]==1

def test_last_picture_is_complete(notebook):
    "It has the last step, whatever was due before"
    clock = HandedClock()
    steps = []
    def counted(sources, *args):
        steps.append(len(sources[0].record().frame('steps')))
        return mpl_figure.Figure(figsize=(1,1))
    notebook(clock, draw=counted)
    fit(step_learner([GradNormCallback(live=1), BatchTakes(clock, 1.)], dls=vector_batches(17)))
    assert steps==[1,2,12,17]   # half a second of drawing is worth ten of training, but for the first

def test_size_does_not_jump(notebook):
    "Tensors that join later make the picture higher, and never lower"
    clock = HandedClock()
    cell = CellOfTest(clock, 0.)
    learn = step_learner([GradStatsCallback(), GradNormCallback()], model=nn.Sequential(*[nn.Linear(6,6) for _ in range(5)]))
    fit(learn)
    records = [learn.grad_norm.record, learn.grad_stats.record, learn.grad_norm.record]
    view = live.LiveView([live.Source(lambda: records.pop(0), 0)], 1., cell, clock)
    for _ in range(3): view.show()
    low,high,after = [size for _,size,_ in cell.shown]
    assert low[1]<high[1]==after[1] and low[0]==high[0]

# --- nothing changes, nothing is left

def test_training_is_the_same(notebook):
    "Bit for bit, with a picture after each batch; nor do generators of random numbers notice"
    clock = HandedClock()
    cells = notebook(clock, cost=1., draw=real_draw)
    def train(cbs):
        learn = step_learner([*cbs, BatchTakes(clock, 4.)], model=nn.Sequential(seeded_mlp(), nn.Dropout(.3)))
        random.seed(3), np.random.seed(3)
        fit(learn, 2)
        return [p.detach().clone() for p in learn.model.parameters()],torch.random.get_rng_state(),random.getstate(),np.random.get_state()[1].tolist()
    plain,watched = train([]),train([GradStatsCallback(live=.5), GradNormCallback(live=.5)])
    assert all(torch.equal(a, b) for a,b in zip(plain[0], watched[0])) and torch.equal(plain[1], watched[1]) and plain[2:]==watched[2:]
    assert len(cells[0].shown)==4

def test_pyplot_does_not_notice(notebook):
    notebook(draw=real_draw)
    fig,ax = plt.subplots()
    style,backend = dict(plt.rcParams),plt.get_backend()
    fit(step_learner([GradStatsCallback(live=True), GradNormCallback(live=True)]))
    assert plt.get_fignums()==[fig.number] and plt.gcf() is fig and plt.gca() is ax
    assert dict(plt.rcParams)==style and plt.get_backend()==backend

def test_one_read_for_each_picture(notebook, monkeypatch):
    "With two callbacks too: what waits on the device comes to the host once"
    clock = HandedClock()
    cells = notebook(clock, cost=0.)
    fetched,fetch = [],Engine.fetch
    def counted(self, n=None):
        if self.commits: fetched.append(len(cells[0].shown) if cells else 0)
        return fetch(self, n)
    monkeypatch.setattr(Engine, 'fetch', counted)
    learn = step_learner([GradStatsCallback(live=3), GradNormCallback(live=3), BatchTakes(clock, 1.)], dls=vector_batches(10))
    fit(learn)
    assert len(cells[0].shown)==4
    assert fetched==[0,1,2,3]   # three while training went on, and that of the epoch's end, for the last

def test_errors_cost_the_picture_only(notebook):
    "One warning in all, and no further try"
    clock = HandedClock()
    tries = []
    def broken(*args):
        tries.append(1)
        raise RuntimeError('no ink')
    notebook(clock, draw=broken)
    learn = step_learner([GradNormCallback(live=1), BatchTakes(clock, 1.)], dls=vector_batches(30, bs=2))
    with warned() as said: fit(learn)
    assert [text for text in said if 'no ink' in text]==['live: the picture failed (RuntimeError: no ink). Training and recording go on without it']
    assert len(tries)==1 and len(learn.grad_norm.df)==30

class Interrupts(Callback):
    "The stop button, at a batch"
    order = 90
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.train_iter==self.n: raise KeyboardInterrupt

@pytest.mark.parametrize('by_fit', [False,True])
def test_an_interrupted_fit(notebook, by_fit):
    "The cell's end draws the last picture, whether the callbacks stay on the Learner or went with the fit; the next fit opens a picture of its own"
    cells = notebook()
    cbs = [GradNormCallback(live=True)]
    learn = step_learner([] if by_fit else cbs, dls=vector_batches(10))
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=[Interrupts(4), *(cbs if by_fit else [])])
    assert cells[0].shown==[]
    cells[0].ends()
    assert len(cells[0].shown)==1 and cells[0].ends is None
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=cbs if by_fit else None)
    assert len(cells)==2 and len(cells[1].shown)==1 and len(cells[0].shown)==1
    assert helpers_on(learn)==[] and cells[1].ends is None

class PicklesInMidFit(Callback):
    pickled = []
    def after_batch(self):
        if self.train_iter==2: self.pickled.append(pickle.dumps(self.learn))

def test_nothing_stays(notebook):
    "No helper on the Learner, none in what is pickled of it; a callback pickles with its record"
    cells = notebook()
    learn = step_learner([GradStatsCallback(live=True), GradNormCallback(live=True), PicklesInMidFit()])
    fit(learn)
    assert helpers_on(learn)==[] and cells[0].ends is None
    assert [b'Live' in o for o in (PicklesInMidFit.pickled.pop(), pickle.dumps(learn))]==[False,False]
    cb = learn.grad_norm
    learn.remove_cb(cb)
    again = pickle.loads(pickle.dumps(cb))
    assert again.live is True and len(again.df)==len(cb.df)

def test_a_fit_that_validates_within(notebook):
    "`validate` in mid-fit does not end the picture"
    clock = HandedClock()
    cells = notebook(clock, cost=0.)
    class Validates(Callback):
        def after_batch(self):
            if self.training and self.iter==1: self.learn.validate()
    learn = step_learner([GradNormCallback(live=1), BatchTakes(clock, 1.), Validates()], dls=vector_batches(6), valid=True)
    fit(learn)
    last,_,_ = cells[0].shown[-1]
    assert len(cells)==1 and last==clock.now>4 and helpers_on(learn)==[]   # not when `validate` was over

# --- arguments, and where there is no notebook

@pytest.mark.parametrize('value', [0, -1, math.inf, math.nan, 'yes', [1]])
@pytest.mark.parametrize('cls', [GradStatsCallback,GradNormCallback])
def test_wrong_values_are_named(cls, value):
    with pytest.raises(ValueError, match='live: accepted are True, False and a number of seconds above 0'): cls(live=value)

def test_a_terminal_gets_a_sentence(tmp_path):
    "Once a fit, and nothing is drawn; it names the folder"
    learn = step_learner([GradStatsCallback(live=True, folder=tmp_path/'a'), GradNormCallback(live=True, folder=tmp_path/'a')])
    with warned() as said: fit(learn, 3)
    said = [text for text in said if 'live' in text]
    assert len(said)==1 and f"`fastai-gradstats report {tmp_path/'a'} --watch`" in said[0] and helpers_on(learn)==[]

def test_ipython_in_a_terminal_is_no_notebook(monkeypatch):
    shells = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=None)),SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel='k')),SimpleNamespace(get_ipython=lambda: None)
    found = []
    for shell in shells:
        monkeypatch.setitem(sys.modules, 'IPython', shell)
        found.append(live.in_notebook())
    assert found==[False,True,False]

# --- titles

def test_pictures_say_run_and_model(tmp_path):
    "Of a Learner the model; of a folder its name too; a title of one's own; axes that are handed in have none"
    learn = step_learner([GradStatsCallback(folder=tmp_path/'lr.1'), GradNormCallback(folder=tmp_path/'lr.1')])
    fit(learn)
    def title(ax): return suptitle(ax.figure)
    rec = GradRecord.load(tmp_path/'lr.1')
    named = 'lr.1: Sequential, SGD'
    assert [title(plot_grad_norm(o)) for o in (learn, rec, tmp_path/'lr.1', rec.select(phase='fit'), learn.grad_norm)]==[named]*5
    assert [title(plot_grad_heatmap(rec, title=t)) for t in ('mine','')]==['mine','']
    assert title(plot_grad_norm(rec, ax=plt.subplots()[1]))==''
    assert title(plot_grad_norm(rec.steps))==''   # a frame knows of no model

# --- a page that follows a folder

def saved_run(folder, n=4):
    "A run of `n` steps in `folder`"
    learn = step_learner([GradStatsCallback(folder=folder), GradNormCallback(folder=folder)], dls=vector_batches(n))
    fit(learn)
    return learn

@pytest.fixture
def short_page(monkeypatch):
    "The page says how many steps there are, and has its scripts"
    def html(rec, phase, title, fit, note='', js=()): return f"{title}: {len(rec.steps)} steps{note}{''.join(js)}"
    monkeypatch.setattr(report, '_html', html)

def test_page_is_written_when_the_folder_changed(tmp_path, short_page):
    "It waits for a folder, says so once, writes once for each change, and the last page stays as it is"
    said = []
    watch = report.PageWatch(tmp_path/'runs'/'a', tell=said.append, seconds=3)
    watch.look(), watch.look()
    assert len(said)==1 and said[0].startswith('Waiting: ') and 'no such folder' in said[0]
    learn = saved_run(tmp_path/'runs'/'a')
    watch.look()
    page = tmp_path/'runs'/'a.html'
    assert said[1:]==[f'{page} follows the run, and refreshes itself in a browser. Ctrl-C ends this']
    first = page.stat().st_mtime_ns
    assert 'location.reload()' in (text := page.read_text()) and ', 3*1000)' in text
    watch.look()
    assert page.stat().st_mtime_ns==first
    fit(learn)
    watch.look()
    assert page.stat().st_mtime_ns!=first and 'a: 8 steps' in page.read_text()
    watch.finish()
    assert 'location.reload()' not in page.read_text() and sorted(f.name for f in (tmp_path/'runs').iterdir())==['a','a.html']

def test_a_page_is_whole(tmp_path, monkeypatch, short_page):
    "Somebody who loads it while it is written has the one before"
    saved_run(tmp_path/'a')
    watch = report.PageWatch(tmp_path/'a', tell=lambda text: None)
    watch.look()
    before = watch.page.read_text()
    monkeypatch.setattr('os.replace', lambda *args: (_ for _ in ()).throw(OSError('disk full')))
    watch.seen = None
    watch.look()
    assert watch.page.read_text()==before and watch.told=='Waiting: disk full'

def test_wrong_arguments_do_not_wait(tmp_path):
    for kw in (dict(watch=True, check=True), dict(watch=True, phase='train'), dict(watch=True, seconds=0)):
        with pytest.raises(SystemExit): report.main(str(tmp_path/'a'), **kw)

def until(f, seconds=60):
    "Wait until `f` is true"
    end = time.monotonic()+seconds
    while not f():
        assert time.monotonic()<end, 'waited in vain'
        time.sleep(.05)

@pytest.mark.slow
def test_watch_beside_a_process_that_writes(tmp_path):
    "The command: started before the run, it follows what this process writes, and ends at Ctrl-C with the verdict"
    command = [sys.executable, '-m', 'fastai_gradstats', 'report', str(tmp_path/'a'), '--watch', '--seconds', '.1']
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout.readline().startswith('Waiting: ')
        page = tmp_path/'a.html'
        class Flushes(Callback):
            "Each batch is on disk, and the page there, before training goes on"
            def after_batch(self):
                for name in ('grad_stats','grad_norm'):
                    consumer = getattr(self.learn, name)._consumer
                    consumer.flush()
                    consumer.write()
                if self.train_iter==2: until(page.exists)
        learn = step_learner([GradStatsCallback(folder=tmp_path/'a'), GradNormCallback(folder=tmp_path/'a'), Flushes()], dls=vector_batches(4))
        fit(learn)
        until(lambda: '4 steps in 1 epochs' in page.read_text())
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
    finally: process.kill()
    assert process.returncode==0 and rest.splitlines()[0]==f'{page} follows the run, and refreshes itself in a browser. Ctrl-C ends this'
    assert re.search(r'checks', rest.splitlines()[-1]) and 'Traceback' not in rest and 'location.reload()' not in page.read_text()

# --- in a browser, and in a real notebook

@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
    "It loads itself anew, keeps the place that was scrolled to, and its scripts raise nothing"
    saved_run(tmp_path/'a')
    watch = report.PageWatch(tmp_path/'a', tell=lambda text: None, seconds=.5)
    watch.look()
    count = """<script>const times = +(sessionStorage.getItem('times') ?? 0)+1
sessionStorage.setItem('times', times)
document.body.dataset.times = times
document.body.dataset.y = scrollY
if(times==1) scrollTo(0, 150)
if(times==3) for(let timer = 0; timer<1000; timer++) clearInterval(timer)   // or Chromium never comes to an end
</script></html>"""
    watch.page.write_text(watch.page.read_text().replace('</html>', count))
    seen = visit_page(watch.page, tmp_path)
    dom = seen.stdout
    assert int(re.search(r'data-times="(\d+)"', dom)[1])>1 and re.search(r'data-y="150', dom)
    assert 'Uncaught' not in seen.stderr

CELLS = """
import time
from fastai.basics import *
from fastai_gradstats.all import *
class Slow(Callback):
    def after_batch(self): time.sleep(.05)
learn = digits_learner(nn.Sequential(nn.Flatten(), nn.Linear(64,10)), cbs=[GradStatsCallback(live=.1), GradNormCallback(live=.1), Slow()])
---
learn.fit(8)
---
class Stop(Callback):
    def after_batch(self):
        if self.training and self.iter==9: raise KeyboardInterrupt
learn.fit(2, cbs=Stop())
---
import matplotlib.pyplot as plt
print(plt.get_fignums(), get_ipython().events.callbacks['post_run_cell'])
"""

def counting_client(nb, pictures):
    "Runs a notebook, and notes messages that show a picture, by cell and kind"
    from nbclient import NotebookClient
    class CountingClient(NotebookClient):
        def process_message(self, msg, cell, cell_index):
            if 'image/png' in msg['content'].get('data', {}): pictures.append((cell_index, msg['msg_type']))
            return super().process_message(msg, cell, cell_index)
    return CountingClient(nb, timeout=300, allow_errors=True, kernel_name='python3', resources=dict(metadata=dict(path=str(ROOT))))

@pytest.mark.slow
def test_in_a_real_notebook(tmp_path):
    "One display for a fit, exchanged as it goes on; an interrupted one has its picture; no figure and no handler is left"
    nbformat = pytest.importorskip('nbformat')
    pictures = []
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source.strip()) for source in CELLS.split('---')])
    counting_client(nb, pictures).execute()
    of_fit = [kind for cell,kind in pictures if cell==1]
    assert of_fit[0]=='display_data' and set(of_fit[1:])=={'update_display_data'}
    of_stopped = [o for o in nb.cells[2].outputs if 'image/png' in o.get('data', {})]
    assert len(of_stopped)==1 and nb.cells[2].outputs[-1].get('ename')=='KeyboardInterrupt'
    assert base64.b64decode(of_stopped[0]['data']['image/png']).startswith(b'\x89PNG')
    assert nb.cells[3].outputs[0]['text'].strip()=='[] []'
