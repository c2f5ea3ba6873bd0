"""A run that goes on with the record of an earlier one, and the few files that many short epochs leave.

The oracle is one uninterrupted run, or what a process had counted before it was killed."""
import json,multiprocessing as mp,os,random,shutil,time
import numpy as np,pandas as pd,pytest,torch
from torch import nn
from fastai.basics import Callback,F
from fastai.callback.schedule import *
from fastai.callback.training import GradientAccumulation
from fastai_gradstats import GradNormCallback,GradRecord,GradRecorder,GradStatsCallback
from fastai_gradstats import files
from fastai_gradstats.files import AT_ONCE,find_parts,merge_parts,read_folder
from fastai_gradstats.stream import Stream
from helpers.records import undated
from helpers.training import both_callbacks,fit,seeded_mlp,step_learner,trained_alike,vector_batches

pytest.importorskip('pyarrow')
context = mp.get_context('forkserver')

def callbacks_in(folder, stats=None, norm=None, **kwargs):
    return both_callbacks(dict(folder=folder, **kwargs, **(stats or {})), dict(folder=folder, **kwargs, **(norm or {})))

def plain(df): return df.astype({c:str for c in df if df[c].dtype=='category'})

def same_record(a, b, hist=False):
    tables = ('tensors','steps','params') + (('hist',) if hist else ())
    for table in tables: pd.testing.assert_frame_equal(plain(a.frame(table)), plain(b.frame(table)), check_dtype=False, check_exact=True)
    assert list(a.names)==list(b.names) and a.threshold==b.threshold
    assert json.dumps(undated(a.facts))==json.dumps(undated(b.facts))
    assert [tuple(map(str, o)) for o in with_names(a.breaks)]==[tuple(map(str, o)) for o in with_names(b.breaks)]

def with_names(breaks): return [o._replace(phase=o.phase if isinstance(o.phase, str) else ('fit','lr_find')[o.phase]) for o in breaks]

def records(learn):
    "Live, as one"
    stats,norm = learn.grad_stats.record,learn.grad_norm.record
    return GradRecord(stats.stores['tensors'], norm.stores['steps'], norm.stores['params'], stats.threshold, facts=stats.facts)

def train(learn, fits):
    for n in fits: fit(learn, n)
    return learn

# --- as one run

ways = dict(plain=({}, {}), histograms=(dict(hist=True), {}), thinned=(dict(keep=5), {}), every=(dict(every=3), dict(every=3)),
            updates=({}, dict(update_every=2)), extra=(dict(extra=dict(cubes=torch.Tensor.nansum), threshold=.1), {}))

@pytest.mark.parametrize('way', ways)
def test_as_one_run(tmp_path, way):
    "Three processes' worth of callbacks, the network being trained on: the record is that of callbacks that were never exchanged"
    stats,norm = ways[way]
    hist = 'hist' in stats
    whole = train(step_learner(both_callbacks(stats, norm)), [2,1,3])
    part = step_learner([])
    for n in (2,1,3):
        cbs = callbacks_in(tmp_path/'a', stats, norm, resume=True)
        part.add_cbs(cbs)
        fit(part, n)
        live = records(part)
        part.remove_cbs(cbs)
    same_record(live, records(whole), hist)
    if 'keep' not in stats: same_record(GradRecord.load(tmp_path/'a'), records(whole), hist)

def test_lr_find_and_accumulation(tmp_path):
    "Phases that count for themselves, steps of two batches of which the last is half a step"
    def learner(cbs): return step_learner([*cbs, GradientAccumulation(16)], dls=vector_batches(5))
    def go(learn):
        with learn.no_bar(), learn.no_logging(): learn.lr_find(show_plot=False, num_it=10)
        return fit(learn, 2)
    whole = go(go(learner(both_callbacks())))
    first = go(learner(callbacks_in(tmp_path/'a')))
    second = learner(callbacks_in(tmp_path/'a', resume=True))
    second.model.load_state_dict(first.model.state_dict())
    go(second)
    a,b = GradRecord.load(tmp_path/'a'),records(whole)
    where = ['phase','fit','epoch','iteration','step','skipped']
    for table in ('tensors','steps'): assert plain(a.frame(table))[where].equals(plain(b.frame(table))[where].astype(plain(a.frame(table))[where].dtypes))
    same_record(a, records(second))

def test_breaks(tmp_path):
    "Where forward passes met a NaN, each once"
    def learner(cbs): return step_learner(cbs, dls=vector_batches(scale={2:np.nan}))
    whole = train(learner(both_callbacks()), [1,1])
    part = fit(learner(callbacks_in(tmp_path/'a')))
    model = part.model
    part = fit(step_learner(callbacks_in(tmp_path/'a', resume=True), model=model, dls=vector_batches(scale={2:np.nan})))
    assert with_names(part.grad_stats.breaks)==with_names(whole.grad_stats.breaks)!=[]
    assert with_names(GradRecord.load(tmp_path/'a').breaks)==with_names(whole.grad_stats.breaks)

def test_plain_loop(tmp_path):
    "A recorder, three times"
    def loop(rec, model, opt):
        with rec:
            for xb,yb in vector_batches().train:
                F.cross_entropy(model(xb), yb).backward()
                opt.step()
                opt.zero_grad()
    def begin():
        model = seeded_mlp()
        return model,torch.optim.SGD(model.parameters(), .1)
    model,opt = begin()
    whole = GradRecorder(model, opt)
    for _ in range(3): loop(whole, model, opt)
    model,opt = begin()
    for _ in range(3):
        rec = GradRecorder(model, opt, folder=tmp_path/'a', resume=True)
        loop(rec, model, opt)
    for r in (rec.record, GradRecord.load(tmp_path/'a')):
        for table in ('tensors','steps','params'): pd.testing.assert_frame_equal(plain(r.frame(table)), plain(whole.record.frame(table)), check_dtype=False)

def test_nothing_there(tmp_path):
    "An empty folder, one that is not there, one with other files"
    (tmp_path/'empty').mkdir()
    (tmp_path/'other').mkdir()
    (tmp_path/'other'/'notes.txt').write_text('mine')
    for name in ('empty','missing','other'):
        for mode in ('resume','overwrite'):
            fit(step_learner(callbacks_in(tmp_path/name, **{mode:True})))
            assert len(GradRecord.load(tmp_path/name))==4
            files_there = {f.name for f in (tmp_path/name).iterdir()}
            assert ('notes.txt' in files_there)==(name=='other')
            for file in (tmp_path/name).glob('*.parquet'): file.unlink()
            (tmp_path/name/'gradstats.json').unlink()

def test_overwrite(tmp_path):
    fit(step_learner(callbacks_in(tmp_path/'a', dict(hist=True))), 3)
    (tmp_path/'a'/'notes.txt').write_text('mine')
    learn = fit(step_learner(callbacks_in(tmp_path/'a', overwrite=True)))
    same_record(GradRecord.load(tmp_path/'a'), records(learn))
    assert len(learn.grad_stats.stats)==4 and (tmp_path/'a'/'notes.txt').read_text()=='mine'
    fit(learn)
    same_record(GradRecord.load(tmp_path/'a'), records(learn))   # a second fit overwrites nothing

def test_saved_and_gone_on_with(tmp_path):
    "What `save` wrote, Parquet or CSV"
    for format in ('parquet','csv'):
        learn = fit(step_learner(both_callbacks()))
        both = records(learn)
        both.save(tmp_path/format, format=format)
        later = fit(step_learner(callbacks_in(tmp_path/format, resume=True)))
        rec = GradRecord.load(tmp_path/format)
        assert len(rec)==8 and rec.df['fit'].unique().tolist()==[0,1] and len(rec.steps)==8
        pd.testing.assert_frame_equal(plain(rec.df), plain(later.grad_stats.df), check_dtype=False)

def test_training_is_the_same(tmp_path):
    trained_alike(seeded_mlp, *callbacks_in(tmp_path/'a'), n=1)
    trained_alike(seeded_mlp, *callbacks_in(tmp_path/'a', resume=True), n=1)

def test_tracker(tmp_path):
    "Each step is sent once, whoever trained it"
    sent = []
    def log(values, step): sent.append(step)
    for n in (2,1,2): fit(step_learner([GradNormCallback(folder=tmp_path/'a', resume=True, log=log, log_every=3)]), n)
    whole = []
    learn = step_learner([GradNormCallback(log=lambda values, step: whole.append(step), log_every=3)])
    for n in (2,1,2): fit(learn, n)
    assert sent==whole and len(set(sent))==len(sent)

# --- what is refused

def refused(learn, match, n=1):
    weights = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=match): fit(learn, n)
    assert all(map(torch.equal, weights, learn.model.parameters()))

def content(folder): return {f.name:f.read_bytes() for f in folder.iterdir() if f.suffix=='.parquet'}

def test_another_network(tmp_path):
    fit(step_learner(callbacks_in(tmp_path/'a')))
    there = content(tmp_path/'a')
    deeper = nn.Sequential(nn.Linear(6,8), nn.Tanh(), nn.Linear(8,8), nn.Tanh(), nn.Linear(8,3))
    for cls,kind in ((GradStatsCallback,'both'), (GradStatsCallback,'param'), (GradNormCallback,None)):
        cb = cls(folder=tmp_path/'a', resume=True, **({} if kind is None else dict(kind=kind)))
        refused(step_learner([cb], model=deeper), r'another network: only the model has 4\.bias, 4\.weight')
    other = nn.Sequential(nn.Linear(6,8), nn.Linear(8,3))
    refused(step_learner(callbacks_in(tmp_path/'a', resume=True), model=other), r'only the record has 2, 2\.bias, 2\.weight; only the model has 1\.bias, 1\.weight')
    assert content(tmp_path/'a')==there
    fit(step_learner(callbacks_in(tmp_path/'a', resume=True)))
    assert len(GradRecord.load(tmp_path/'a'))==8

@pytest.mark.parametrize('cls,made,given,say', [
    (GradStatsCallback, {}, dict(threshold=2.), 'made with threshold=1.0, not threshold=2.0'), (GradStatsCallback, dict(hist=True), {}, 'made with hist=True'),
    (GradStatsCallback, {}, dict(extra=dict(total=torch.sum)), r"extra=\[\], not extra=\['total'\]"), (GradStatsCallback, {}, dict(keep=7), 'keep=10000, not keep=7'),
    (GradNormCallback, dict(update_every=2), {}, 'update_every=True')], ids='threshold hist extra keep update_every'.split())
def test_other_options(tmp_path, cls, made, given, say):
    fit(step_learner([cls(folder=tmp_path/'a', **made)]))
    refused(step_learner([cls(folder=tmp_path/'a', resume=True, **given)]), say)

def test_arguments(tmp_path):
    for make in (GradStatsCallback, GradNormCallback, lambda **kw: GradRecorder(seeded_mlp(), **kw)):
        with pytest.raises(ValueError, match='resume: accepted beside `folder=`'): make(resume=True)
        with pytest.raises(ValueError, match='overwrite: accepted are True and False'): make(folder=tmp_path/'b', overwrite='yes')
        with pytest.raises(ValueError, match='not both'): make(folder=tmp_path/'b', resume=True, overwrite=True)
    fit(step_learner([GradStatsCallback(folder=tmp_path/'a')]))
    with pytest.raises(ValueError, match=r'already holds a record.*resume=True.*overwrite=True'): GradStatsCallback(folder=tmp_path/'a')

def test_rows_of_its_own(tmp_path):
    "A callback that has rows cannot take in others"
    fit(step_learner([GradStatsCallback(folder=tmp_path/'a')]))
    learn = fit(step_learner([GradStatsCallback()]))
    learn.grad_stats.folder,learn.grad_stats.resume = tmp_path/'a',True
    refused(learn, 'has rows of its own')

def test_not_ours(tmp_path):
    "Files that only look like parts are not removed"
    import pyarrow as pa,pyarrow.parquet as pq
    (tmp_path/'a').mkdir()
    pq.write_table(pa.table(dict(x=[1])), tmp_path/'a'/'steps-0-000000.parquet')
    refused(step_learner(callbacks_in(tmp_path/'a', overwrite=True)), 'no gradstats.json')
    fit(step_learner(callbacks_in(tmp_path/'b')))
    shutil.copy(tmp_path/'a'/'steps-0-000000.parquet', tmp_path/'b'/'steps-0-000007.parquet')
    there = content(tmp_path/'b')
    refused(step_learner(callbacks_in(tmp_path/'b', overwrite=True)), 'steps-0-000007.parquet is no part of a record of ours')
    assert content(tmp_path/'b')==there

def test_damaged(tmp_path):
    fit(step_learner([GradStatsCallback(folder=tmp_path/'a')]))
    file = tmp_path/'a'/'tensors-0-000000.parquet'
    file.write_bytes(file.read_bytes()[:-9])
    refused(step_learner([GradStatsCallback(folder=tmp_path/'a', resume=True)]), 'tensors-0-000000.parquet: damaged')

# --- processes that are killed

class Counts(Callback):
    "Counts steps where another process sees them"
    order,run_valid = 1000,False
    def __init__(self, n): self.n = n
    def after_batch(self): self.n.value += 1

FLUSHED_EVERY = 4
def train_on(folder, n, mode):
    torch.set_num_threads(1)
    Stream.every = FLUSHED_EVERY
    fit(step_learner([*callbacks_in(folder, **mode), Counts(n)], dls=vector_batches(6)), 100_000)

def killed(folder, wait, **mode):
    "How many batches a process trained before it was killed"
    n = context.Value('q', 0, lock=False)
    process = context.Process(target=train_on, args=(folder, n, mode))
    process.start()
    while n.value<3*FLUSHED_EVERY and process.is_alive(): time.sleep(.001)   # until both callbacks have written
    time.sleep(wait)
    process.kill()
    process.join()
    assert process.exitcode==-9
    return n.value

def one_record(folder, trained):
    "Runs that were killed after so many batches: each is a fit, with its first rows, nothing twice and nothing lost but the last"
    rec = GradRecord.load(folder)
    assert rec.df['fit'].unique().tolist()==rec.steps['fit'].unique().tolist()==[f['fit'] for f in rec.facts]==[*range(len(trained))]
    assert not rec.steps.duplicated(['phase','step']).any() and not rec.by().duplicated(['phase','step','name']).any()
    assert not rec.df.duplicated(['phase','iteration','kind','name','out','call']).any()
    for df in (rec.df, rec.steps, rec.by()):
        assert (np.diff(df['iteration'])>=0).all()
        for fit_number,n in enumerate(trained):
            iterations = df.loc[df['fit']==fit_number,'iteration'].unique()
            assert iterations.tolist()==[*range(iterations[0], iterations[0]+len(iterations))]   # the first ones, without a gap
            assert n-FLUSHED_EVERY-1<=len(iterations)<=n+1
    first = train_apart(len(rec.steps.query('fit==0')))
    for fit_number in range(len(trained)):   # each run has the same seed, and so the same norms
        norms = rec.steps.loc[rec.steps['fit']==fit_number,'norm'].to_numpy()
        m = min(len(norms), len(first))
        np.testing.assert_array_equal(norms[:m], first[:m])

def train_apart(n):
    "The norms of a run that nobody killed, with the same callbacks: what else a gradient is read for may change the last bit of its norm"
    return fit(step_learner(both_callbacks(), dls=vector_batches(6)), n//6+1).grad_norm.steps['norm'].to_numpy()

def test_killed_once(tmp_path):
    "Where the process was, another goes on; a whole run ends it"
    trained = [killed(tmp_path/'a', .1)]
    learn = fit(step_learner(callbacks_in(tmp_path/'a', resume=True), dls=vector_batches(6)), 3)
    one_record(tmp_path/'a', [*trained, 18])
    same_record(GradRecord.load(tmp_path/'a'), records(learn))
    assert not list((tmp_path/'a').glob('.*'))

@pytest.mark.battery
@pytest.mark.parametrize('seed', range(3))
def test_killed_three_times(tmp_path, seed):
    rng = random.Random(seed)
    trained = [killed(tmp_path/'a', rng.uniform(0, .6), resume=True) for _ in range(4)]
    one_record(tmp_path/'a', trained)

def test_two_processes(tmp_path):
    "While one lives, another can neither go on nor begin anew; once it is killed, it can"
    n = context.Value('q', 0, lock=False)
    process = context.Process(target=train_on, args=(tmp_path/'a', n, {}))
    process.start()
    while not n.value and process.is_alive(): time.sleep(.001)
    for mode in ('resume','overwrite'): refused(step_learner(callbacks_in(tmp_path/'a', **{mode:True})), 'taken by another process, which still lives')
    m = n.value
    while n.value<m+50 and process.is_alive(): time.sleep(.001)   # it trains and writes on
    process.kill()
    process.join()
    one_record(tmp_path/'a', [n.value])
    fit(step_learner(callbacks_in(tmp_path/'a', overwrite=True)))
    assert len(GradRecord.load(tmp_path/'a'))==4

def test_an_earlier_callback_writes_no_more(tmp_path):
    "In one process, a new callback takes the folder over; the old one says so and keeps its record in memory"
    old = fit(step_learner([GradStatsCallback(folder=tmp_path/'a')]))
    new = fit(step_learner([GradStatsCallback(folder=tmp_path/'a', resume=True)]))
    with pytest.warns(UserWarning, match='not what this run wrote'): fit(old)
    pd.testing.assert_frame_equal(plain(GradRecord.load(tmp_path/'a').df), plain(new.grad_stats.df))
    assert len(old.grad_stats.stats)==8

# --- few files

def folder_of_epochs(folder, n): return fit(step_learner(callbacks_in(folder), dls=vector_batches(2)), n)

@pytest.mark.slow
def test_short_epochs(tmp_path):
    "A hundred epochs, tens of files"
    learn = folder_of_epochs(tmp_path/'a', 102)
    there = [f.name for f in (tmp_path/'a').iterdir()]
    assert len(there)<50, len(there)
    same_record(GradRecord.load(tmp_path/'a'), records(learn))
    assert [f['fit'] for f in GradRecord.load(tmp_path/'a').facts]==[0]

@pytest.mark.slow
def test_rows_are_rewritten_few_times(tmp_path, monkeypatch):
    "As often as eights fit into the number of epochs"
    rows = []
    def counted(table, df, *args, encode=files.encode, **kwargs):
        rows.append(len(df) if table=='steps' else 0)
        return encode(table, df, *args, **kwargs)
    monkeypatch.setattr(files, 'encode', counted)
    learn = fit(step_learner([GradNormCallback(folder=tmp_path/'a')], dls=vector_batches(2)), 130)
    assert sum(rows)<=len(learn.grad_norm.steps)*(1+2), sum(rows)   # 8 * 8 <= 130 < 8 * 8 * 8

def test_facts_ride_on(tmp_path):
    "Many fits, whose facts are on parts that are merged"
    learn = step_learner(callbacks_in(tmp_path/'a'), dls=vector_batches(2))
    for i in range(20):
        learn.model[0].requires_grad_(i%2==0)
        fit(learn)
    same_record(GradRecord.load(tmp_path/'a'), records(learn))
    assert any(part.last>part.number for part in find_parts(tmp_path/'a')['tensors'])

class Killed(BaseException): "As a process that ends"

@pytest.mark.parametrize('at', [0, *(pytest.param(at, marks=pytest.mark.slow) for at in range(1, AT_ONCE))])
def test_killed_while_merging(tmp_path, monkeypatch, at):
    "Before the switch, and after each part that is removed: the rows are there once, and a run that goes on tidies up"
    folder_of_epochs(tmp_path/'a', AT_ONCE-1)
    removed = []
    parts = find_parts(tmp_path/'a')['steps']
    want = read_folder(tmp_path/'a')[0]['steps']
    def unlink(path, *args, unlink=os.unlink, **kwargs):
        if len(removed)==at-1: raise Killed
        removed.append(path)
        unlink(path)
    def replace(*args): raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if at==0: patch.setattr(os, 'replace', replace)
        patch.setattr(type(tmp_path), 'unlink', unlink)
        merge_parts(parts)
    pd.testing.assert_frame_equal(read_folder(tmp_path/'a')[0]['steps'], want)
    later = fit(step_learner(callbacks_in(tmp_path/'a', resume=True), dls=vector_batches(2)))
    same_record(GradRecord.load(tmp_path/'a'), records(later))
    left = sorted(f.name for f in (tmp_path/'a').iterdir())
    assert len([name for name in left if name.startswith('steps')])<=(1 if at==0 else 2), left
    assert not [name for name in left if name.startswith('.')]

def read_until(folder, stop, queue):
    "Load all the time: rows that were there once stay there, each once"
    last,loads = 0,0
    while not stop.is_set():
        try: rec = GradRecord.load(folder)
        except (FileNotFoundError,ValueError) as e:
            if last==0 and ('no such folder' in str(e) or 'no record' in str(e)): continue
            queue.put(f'{type(e).__name__}: {e}')
            return
        steps = rec.steps['step'].tolist()
        if steps!=[*range(len(steps))] or len(steps)<last:
            queue.put(f'{last} steps, then {len(steps)}: {steps[-5:]}')
            return
        last,loads = len(steps),loads+1
    queue.put(loads)

@pytest.mark.slow
def test_read_while_merging(tmp_path):
    "Another process loads while parts are written and merged"
    stop,queue = context.Event(),context.Queue()
    process = context.Process(target=read_until, args=(tmp_path/'a', stop, queue))
    process.start()
    folder_of_epochs(tmp_path/'a', 150)
    stop.set()
    loads = queue.get(timeout=60)
    process.join()
    assert isinstance(loads, int) and loads>3, loads

def test_a_damaged_part_is_left(tmp_path):
    "It is not merged, and named by whoever loads; what comes after it is written"
    learn = folder_of_epochs(tmp_path/'a', 3)
    file = tmp_path/'a'/'steps-0-000001.parquet'
    damaged = file.read_bytes()[:-5]
    file.write_bytes(damaged)
    fit(learn, 20)
    assert file.read_bytes()==damaged
    with pytest.raises(ValueError, match='steps-0-000001.parquet: damaged'): GradRecord.load(tmp_path/'a')
    with pytest.warns(UserWarning, match='1 parts left out'): rec = GradRecord.load(tmp_path/'a', errors='skip')
    assert len(rec.steps)==2*23-2
