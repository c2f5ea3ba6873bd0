"Norms that are sent to a tracker while training goes on: the record's own, each step in one entry."
import json,math,pickle,struct,sys
import pytest
from fastai.basics import *
from fastai.callback.schedule import *
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai_gradstats import GradNormCallback,GradRecorder,GradStatsCallback
from fastai_gradstats.engine import Engine
from helpers.callbacks import CPUAmp,Overflow
from helpers.project import run_forked
from helpers.training import fit,seeded_mlp,step_learner,trained_alike,vector_batches,warned

class Entries(list):
    "What a function is told"
    def __call__(self, values, step): self.append((step,values))
    @property
    def steps(self): return [step for step,_ in self]

def intervals(steps, every):
    "The record's steps that were taken, by interval and fit"
    groups = steps.groupby([steps['step']//every,'fit'], sort=True)
    return [group for _,group in groups]

def entries_of(df):
    "Entries by definition, from a record's steps"
    taken = df[~df['skipped']]
    return {'grad/norm':taken['norm'].mean(skipna=False), 'grad/norm_max':df['norm'].max(skipna=False), 'grad/clipped_norm':taken['clipped_norm'].mean(skipna=False),
            'grad/clip_share':(taken['clip_coef']<1).mean(), 'grad/skipped':int(df['skipped'].sum()), 'grad/nonfinite':int(df['nonfinite'].sum())}

def assert_entries(sent, steps, every):
    groups = intervals(steps, every)
    assert sent.steps==[group['step'].iloc[-1] for group in groups]
    for (_,values),group in zip(sent, groups):
        want = entries_of(group)
        assert {name:values[name] for name in want}==pytest.approx(want, rel=1e-6, nan_ok=True)

# --- what is sent

def test_each_step_in_one_entry():
    "Over three fits with validations, of which none is a multiple of the entries"
    sent = Entries()
    learn = step_learner([GradNormCallback(log=sent, log_every=3), GradientClip(.5)], valid=True)
    for _ in range(3): fit(learn, 2)
    assert_entries(sent, learn.grad_norm.steps, 3)
    assert any(0<values['grad/clip_share'] for _,values in sent)

@pytest.mark.parametrize('by,column', [('param','name'), ('module','name'), ('group','group')])
def test_norms_of_parts(by, column):
    sent = Entries()
    learn = step_learner([GradNormCallback(log=sent, log_every=2, log_by=by)], splitter=lambda m: [params(m[0]), params(m[2])])
    fit(learn, 2)
    means = learn.grad_norm.by(by).assign(interval=lambda df: df['step']//2).groupby(['interval',column], observed=True)['norm'].mean()
    found = {name:value for name,value in sent[1][1].items() if name.startswith('grad_norm/')}
    prefix = 'grad_norm/group ' if by=='group' else 'grad_norm/'
    assert found==pytest.approx({f'{prefix}{part}':value for part,value in means.loc[1].items()}, rel=1e-5)

def test_totals_only():
    sent = Entries()
    fit(step_learner([GradNormCallback(log=sent, log_every=2, log_by=None)]))
    assert all(name.startswith('grad/') for _,values in sent for name in values)

def test_what_is_not_finite_is_told():
    "A NaN in one step is in the entry, and not in the next"
    sent = Entries()
    fit(step_learner([GradNormCallback(log=sent, log_every=2)], dls=vector_batches(scale={1:math.nan})))
    assert math.isnan(sent[0][1]['grad/norm']) and math.isnan(sent[0][1]['grad/norm_max']) and sent[0][1]['grad/nonfinite']>0

def test_skipped_steps():
    "Steps that AMP leaves out count as skipped, and not in the means"
    sent = Entries()
    learn = step_learner([GradNormCallback(log=sent, log_every=4), CPUAmp(init_scale=2.**10), Overflow([1])])
    fit(learn)
    assert_entries(sent, learn.grad_norm.steps, 4)
    assert sent[0][1]['grad/skipped']==1 and math.isfinite(sent[0][1]['grad/norm'])

def test_accumulation_and_every():
    "Entries are of steps, not of batches; of those that are recorded"
    sent = Entries()
    learn = step_learner([GradNormCallback(every=2, log=sent, log_every=4), GradientAccumulation(16)], dls=vector_batches(20))
    fit(learn)
    assert learn.grad_norm.steps['step'].tolist()==[0,2,4,6,8]
    assert_entries(sent, learn.grad_norm.steps, 4)

def test_lr_find_is_not_sent():
    sent = Entries()
    learn = step_learner([GradNormCallback(log=sent, log_every=2)])
    with learn.no_bar(), learn.no_logging(): learn.lr_find(show_plot=False, num_it=6)
    assert not sent
    fit(learn)
    assert sent.steps==[1,3]

def test_changed_between_fits():
    "What `log` is set to counts from the next fit on"
    first,second = Entries(),Entries()
    learn = fit(step_learner([GradNormCallback(log=first, log_every=2)]))
    learn.grad_norm.log = second
    fit(learn)
    assert (first.steps,second.steps)==([1,3], [5,7])

def test_plain_loop():
    "A recorder sends what the callback sends"
    of_callback,of_recorder = Entries(),Entries()
    fit(step_learner([GradNormCallback(log=of_callback, log_every=3)]))
    model,dl = seeded_mlp(),vector_batches().train
    opt = torch.optim.SGD(model.parameters(), .1)
    with GradRecorder(model, opt, log=of_recorder, log_every=3):
        for xb,yb in dl:
            F.cross_entropy(model(xb), yb).backward()
            opt.step()
            opt.zero_grad()
    assert of_callback.steps==of_recorder.steps
    for (_,a),(_,b) in zip(of_callback, of_recorder): assert a==pytest.approx(b, rel=1e-6)

# --- what it costs

def test_one_read_of_the_device_an_entry(monkeypatch):
    "Also where four batches make a step"
    reads = []
    def fetch(engine, count=None, fetch=Engine.fetch):
        if engine.commits: reads.append(len(engine.commits))
        return fetch(engine, count)
    monkeypatch.setattr(Engine, 'fetch', fetch)
    learn = step_learner([GradStatsCallback(), GradNormCallback(log=Entries(), log_every=5), GradientAccumulation(32)], dls=vector_batches(80))
    fit(learn)
    assert len(learn.grad_norm.steps)==20
    assert len(reads)<=20/5+1, reads   # and one at the end of training

def test_training_is_the_same():
    trained_alike(seeded_mlp, GradNormCallback(log=Entries(), log_every=1), GradStatsCallback(), n=2)

# --- what goes wrong

@pytest.mark.parametrize('kwargs,said', [(dict(log='wand'), "log: accepted are 'wandb', 'tensorboard', 'mlflow', 'trackio'"), (dict(log=3), 'log: accepted are'),
                                         (dict(log=print, log_every=0), 'log_every: a whole number'), (dict(log=print, log_by='layer'), "log_by: accepted are 'param'")])
def test_wrong_arguments(kwargs, said):
    with pytest.raises(ValueError, match=said): GradNormCallback(**kwargs)

def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mlflow', None)
    with pytest.raises(ImportError, match='pip install mlflow'): GradNormCallback(log='mlflow')

def test_a_tracker_that_fails():
    "Is told of once, and training goes on"
    def fails(values, step): raise OSError('no network')
    with warned() as said: learn = fit(step_learner([GradNormCallback(log=fails, log_every=1)]))
    assert len(learn.grad_norm.steps)==4
    assert len([s for s in said if 'no network' in s])==1

def test_interrupted_while_sending():
    "A Ctrl-C in the tracker: what it had is not sent again, the record has all"
    sent = Entries()
    def interrupted(values, step):
        sent(values, step)
        if len(sent)==2: raise KeyboardInterrupt
    learn = step_learner([GradNormCallback(log=interrupted, log_every=1)])
    with pytest.raises(KeyboardInterrupt): fit(learn)
    fit(learn)
    assert len(set(sent.steps))==len(sent.steps)
    assert set(learn.grad_norm.steps['step'])==set(sent.steps)

def test_copies_and_pickles_have_no_tracker(tmp_path):
    "What is loaded sends to what it is told to"
    learn = fit(step_learner([GradNormCallback(log=print_nothing, log_every=2)]))
    callback = learn.grad_norm
    learn.remove_cb(callback)
    loaded = pickle.loads(pickle.dumps(callback))
    assert loaded.log is print_nothing and len(loaded.steps)==4

def print_nothing(values, step): pass

# --- the real ones

@pytest.mark.slow
def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter
    learn = step_learner([GradNormCallback(log=SummaryWriter(tmp_path), log_every=2)])
    fit(learn, 2)
    read = EventAccumulator(str(tmp_path)).Reload()
    events = read.Scalars('grad/norm')
    assert [e.step for e in events]==[1,3,5,7]
    assert [e.value for e in events]==pytest.approx(learn.grad_norm.steps['norm'].to_numpy().reshape(-1,2).mean(1), rel=1e-6)

class LogsSteps(Callback):
    "Logs the loss as fastai's WandbCallback does, with steps of its own"
    order = 80
    def __init__(self, run): self.run = run
    def before_fit(self): self.step = -1
    def after_batch(self):
        self.step += 1
        self.run.log({'train_loss':self.loss.item(), 'its step':self.step}, step=self.step)

@pytest.mark.slow
def test_wandb(tmp_path):
    "Offline, beside somebody who logs with steps of his own: nothing of either is lost"
    wandb = pytest.importorskip('wandb')
    learn = step_learner([GradNormCallback(log='wandb', log_every=2)])
    with pytest.raises(RuntimeError, match='wandb.init'): fit(learn)
    with wandb.init(project='test', mode='offline', dir=tmp_path) as run:   # its variables are read once in a process
        learn.add_cb(LogsSteps(run))
        fit(learn, 2)
        directory = run.dir
        assert run.summary['grad/step']==7
        assert run.summary['grad/norm']==pytest.approx(learn.grad_norm.steps['norm'][-2:].mean())
    rows = history_of(next(Path(directory).parent.glob('*.wandb')))
    assert [row['grad/step'] for row in rows if 'grad/step' in row]==[1,3,5,7], rows
    assert [row['its step'] for row in rows if 'its step' in row]==list(range(8))

def history_of(path):
    "The rows that an offline run of W&B wrote, in its file of few records"
    from wandb.proto.wandb_internal_pb2 import Record
    written,position,rows = path.read_bytes(),7,[]
    assert len(written)<2**15   # one block
    while position<len(written):
        _,size,_ = struct.unpack_from('<IHB', written, position)
        record = Record.FromString(written[position+7:position+7+size])
        position += 7+size
        if record.HasField('history'): rows.append({'/'.join(item.nested_key) or item.key:json.loads(item.value_json) for item in record.history.item})
    return rows

@pytest.mark.slow
def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip('mlflow')
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    mlflow.set_tracking_uri((tmp_path/'mlruns').as_uri())
    with mlflow.start_run() as run: learn = fit(step_learner([GradNormCallback(log='mlflow', log_every=2)]), 2)
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, 'grad/norm')
    assert [m.step for m in history]==[1,3,5,7]
    assert [m.value for m in history]==pytest.approx(learn.grad_norm.steps['norm'].to_numpy().reshape(-1,2).mean(1))

@pytest.mark.slow
def test_trackio(tmp_path, monkeypatch):
    "In a process of its own: it reads its folder's name when it is imported"
    pytest.importorskip('trackio')
    printed,_ = run_forked("""
import trackio
from fastai.basics import *
from trackio.sqlite_storage import SQLiteStorage
from fastai_gradstats import GradNormCallback
from helpers.training import fit,step_learner
trackio.init(project='p', name='r')
learn = fit(step_learner([GradNormCallback(log='trackio', log_every=2)]), 2)
trackio.finish()
logs = SQLiteStorage.get_logs('p', 'r')
assert [o['step'] for o in logs]==[1,3,5,7]
assert np.allclose([o['grad/norm'] for o in logs], learn.grad_norm.steps['norm'].to_numpy().reshape(-1,2).mean(1))
print('right')""", TRACKIO_DIR=str(tmp_path))
    assert printed.strip().endswith('right')
