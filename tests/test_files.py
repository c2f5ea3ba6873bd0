"Records on disk: what was written comes back, whatever went wrong on the way."
import json,multiprocessing as mp,os,random,re,shutil,subprocess,sys,time,warnings
from contextlib import contextmanager
from itertools import count
from unittest import mock
from datetime import timedelta
from pathlib import Path
import numpy as np,pandas as pd,pytest
from fastai.basics import Callback,CancelTrainException,Learner,SGD,accuracy,partial
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback,SaveModelCallback
from fastai.callback.training import GradientAccumulation
from types import SimpleNamespace
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from fastai_gradstats import GradNormCallback,GradRecord,GradStatsCallback,diagnose
from fastai_gradstats.files import category,claim,dtype,fixed,release,schema
from fastai_gradstats.record import as_record
from fastai_gradstats.stream import Stream
from helpers.callbacks import TrainOnly
from helpers.project import ROOT,run_command
from helpers.records import undated
from helpers.training import fit,fsdp_runs_here,loaders

pytest.importorskip('pyarrow')

def file_learner(cbs, n=60, seed=0, **kwargs):
    torch.manual_seed(seed)
    x,y = torch.randn(n, 4),torch.randint(0, 3, (n,))
    return Learner(loaders(x, y, bs=10), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), loss_func=nn.CrossEntropyLoss(), cbs=cbs, **kwargs)

def callbacks_into(folder, **kwargs): return GradStatsCallback(folder=folder),GradNormCallback(folder=folder, **kwargs)

def same_as_callbacks(rec, gcb, gnc):
    pd.testing.assert_frame_equal(rec.df, gcb.df)
    pd.testing.assert_frame_equal(rec.steps, gnc.df)
    pd.testing.assert_frame_equal(rec.by(), gnc.by(), check_dtype=False)

def test_stream(tmp_path):
    "Two fits with accumulation over an odd number of batches"
    (tmp_path/'link').symlink_to(tmp_path)
    gcb,gnc = GradStatsCallback(folder=tmp_path/'link'/'a'),GradNormCallback(folder=f'{tmp_path}/b/../a', update_every=1)
    learn = file_learner([gcb, gnc, GradientAccumulation(40)])
    fit(learn, 2); fit(learn)
    same_as_callbacks(GradRecord.load(tmp_path/'a'), gcb, gnc)
    assert not list((tmp_path/'a').glob('.*'))

def test_taken(tmp_path):
    fit(file_learner(callbacks_into(tmp_path/'a')))
    with pytest.raises(ValueError, match='already holds a record'): GradStatsCallback(folder=tmp_path/'a')

def test_update_norm():
    "Plain SGD moves a parameter by lr times its gradient"
    gnc = GradNormCallback(update_every=2)
    fit(file_learner(gnc, opt_func=partial(SGD, mom=0.), wd=0.), lr=.1)
    df = gnc.df
    np.testing.assert_allclose(df['update_norm'][::2], .1*df['norm'][::2], rtol=1e-4)
    assert df['update_norm'][1::2].isna().all()
    p = gnc.by()
    np.testing.assert_allclose(p['update_norm'][p['step']%2==0], .1*p['norm'][p['step']%2==0], rtol=1e-3)

def test_show(tmp_path):
    gnc = GradNormCallback(show=True)
    learn = file_learner(gnc, path=tmp_path, metrics=accuracy)
    plain = file_learner(None, metrics=accuracy)
    fit(learn, 2, cbs=[CSVLogger(), SaveModelCallback(monitor='grad_norm', comp=np.less)]); fit(plain, 2)
    log = CSVLogger.read_log(SimpleNamespace(path=tmp_path, fname='history.csv'))
    assert list(log)==['epoch','train_loss','valid_loss','accuracy','grad_norm','time']
    np.testing.assert_allclose(log['grad_norm'], gnc.df.groupby('epoch')['norm'].mean(), rtol=1e-6)
    assert len(learn.validate())==len(plain.validate())==2
    learn.remove_cb(gnc)
    fit(learn)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','accuracy','time'] and len(learn.cbs)==len(plain.cbs)

class Halves(nn.Module):
    "One layer is never used, the last but one is frozen, a rectifier is dead"
    def __init__(self):
        super().__init__()
        self.a,self.dead,self.frozen,self.head,self.idle = nn.Linear(4, 8),nn.Linear(8, 8),nn.Linear(8, 8),nn.Linear(8, 3),nn.Linear(8, 3)
        nn.init.constant_(self.dead.bias, -100.)
        self.frozen.requires_grad_(False)
    def forward(self, x): return self.head(self.frozen(self.dead(self.a(x)).relu()))

def test_elsewhere(tmp_path):
    "A process with neither torch nor fastai reads a folder, streamed or saved: plots, and findings that are those of the live record"
    folders,want = [],[]
    for i,include in enumerate((None, '^(a|dead|frozen)')):
        learn = file_learner([GradStatsCallback(folder=tmp_path/f'{i}a', include=include), GradNormCallback(folder=tmp_path/f'{i}a', update_every=2)])
        learn.model = Halves()
        learn.create_opt()
        fit(learn); fit(learn)
        f,rec = diagnose(learn),as_record(learn)
        assert {'frozen','dead_units','unused'}-({'unused'} if include else set()) <= set(f['rule'])
        assert not {'unused','frozen','fp16_flush'} & set(f.query('severity=="not checked"')['rule'])
        if include:
            assert 'unused' not in set(f['rule'])
            of_facts = [n for n,*_ in rec.facts[0]['params']]
            assert of_facts==['a.weight','a.bias','dead.weight','dead.bias','frozen.weight','frozen.bias']
        rec.save(tmp_path/f'{i}b'); rec.save(tmp_path/f'{i}c', format='csv')
        folders += [str(tmp_path/f'{i}{n}') for n in 'abc']
        want += [f.to_json()]*3
    code = """if True:
        import sys
        from fastai_gradstats import diagnose,plot_grad_log10,plot_grad_norm
        for d in sys.argv[1:]:
            diagnose(d).to_json(d+'.json')
            plot_grad_log10(d)
            plot_grad_norm(d)
        assert not {'torch','fastai'} & sys.modules.keys()
    """
    run_command(sys.executable, '-c', code, *folders, cwd=ROOT)
    assert [open(d+'.json').read() for d in folders]==want

def golden_record():
    "A record with every table, both phases, NaN and inf, a skipped step, an extra column and facts"
    def table(t, n, **cols):
        def column(c, d):
            if c in cols: return cols[c]
            return category([0]*n, fixed[c]) if c in fixed else np.arange(n).astype(d)
        return pd.DataFrame({c:column(c, d) for c in schema[t] if (d := dtype(t, c))})
    phase = category([0,0,1,0], fixed['phase'])
    rows = table('tensors', 4, phase=phase, kind=category([0,1,0,1], fixed['kind']), name=category([0,1,0,1], ['body.0','body.0.weight']),
                 max_abs=np.float32([.5,np.inf,np.nan,1e-20]), skipped=[False,True,False,False], numel=[2**40,3,4,5]).assign(cubes=np.float32([1,2,3,np.nan]))
    steps = table('steps', 4, phase=phase, norm=[.1,np.nan,3.,1e300], skipped=[False,True,False,False]).assign(
        update_norm=[.1,np.nan,.3,.4], update_ratio=[1.,np.nan,3,4])
    params = table('params', 4, phase=phase, name=category([0,1,0,1], ['body.0.weight','body.0.bias']))
    facts = [dict(fit=i, phase=0, params=[['body.0.weight',True,2],['body.0.bias',False,1]], half=False, scaled=False) for i in (0,1,3)]
    return GradRecord(rows, steps, params, .5, [(1,'fit',1,'(input)','body.0')], facts)

def test_golden():
    "A folder written by the first version that had this format"
    rec,want = GradRecord.load(ROOT/'tests'/'golden'),golden_record()
    pd.testing.assert_frame_equal(rec.df, want.df, check_exact=True)
    pd.testing.assert_frame_equal(rec.steps, want.steps, check_exact=True)
    pd.testing.assert_frame_equal(rec.frame('params'), want.frame('params'), check_exact=True)
    assert (rec.threshold,list(rec.breaks),undated(rec.facts))==(want.threshold,want.breaks,undated(want.facts))

odd_names = ['a,b','q"u\'o',' new\nline','a\r\nb','','NA','nan','None','1.0','ü漢','\\N']
@pytest.mark.parametrize('format', ['parquet','csv'])
def test_formats(tmp_path, format):
    "Both hold the same: odd names, NaN and inf, the smallest number, extra columns in their type"
    want = golden_record()
    want.stores['tensors'] = want.df.loc[np.arange(11)%4].reset_index(drop=True).assign(
        **{'a, "b"':np.float32(.1), 'mean':np.float32([-np.inf,1e-45,*range(9)]), 'name':category(np.arange(11), odd_names)})
    want.save(tmp_path/'ü b', format=format)
    rec = GradRecord.load(tmp_path/'ü b')
    for a,b in ((rec.df,want.df), (rec.steps,want.steps), (rec.by(),want.by())): pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert list(rec.names)==odd_names

def copy_golden(to): return Path(shutil.copytree(ROOT/'tests'/'golden', to/'a'))

def _empty(d): shutil.rmtree(d); d.mkdir()
def _other(d): _empty(d); (d/'notes.txt').write_text('hello')
def _mark(d, **kw): (d/'gradstats.json').write_text(json.dumps(json.loads((d/'gradstats.json').read_text())|kw))
def _file(d): shutil.rmtree(d); d.write_text('hello')
def _part(d, format=1):
    "One part again, with another format number inside"
    import pyarrow.parquet as pq
    fn = d/'steps-0-000000.parquet'
    t = pq.read_table(fn)
    pq.write_table(t.replace_schema_metadata({'fastai_gradstats':json.dumps(dict(format=format))} if format else {}), fn)

@pytest.mark.parametrize('spoil,say',
                         [(_empty, 'no record; expected are files like tensors-0-000000.parquet, found nothing'),
                          (_other, 'found notes.txt'), (shutil.rmtree, 'no such folder'), (_file, 'is a file, expected a folder'),
                          (partial(_mark, format=2), 'gradstats.json: format 2 found, this version reads format 1'),
                          (partial(_mark, facts=[1]), "'facts' is not"),
                          (partial(_part, format=7), 'steps-0-000000.parquet: format 7 found, this version reads format 1'),
                          (partial(_part, format=None), 'not a gradstats file'),
                          (lambda d: (d/'params-0-000000.parquet').write_bytes(b'hello'), 'params-0-000000.parquet: damaged'),
                          (lambda d: (d/'gradstats.json').write_text('{"format": 1, "tab'), 'gradstats.json: damaged'),
                          (lambda d: (d/'gradstats.json').write_text('[1]'), 'not a gradstats file')],
                         ids='empty other none file mark facts part foreign damaged cut list'.split())
def test_bad_input(tmp_path, spoil, say):
    spoil(d := copy_golden(tmp_path))
    with pytest.raises((ValueError,FileNotFoundError), match=re.escape(say)) as e: GradRecord.load(d)
    assert str(d) in str(e.value)

def test_skip(tmp_path):
    "What is damaged is named and left out, facts too"
    d = copy_golden(tmp_path)
    _part(d, 7); _mark(d, facts=[1])
    with pytest.warns(UserWarning, match='2 parts left out.*steps-0-000000'): rec = GradRecord.load(d, errors='skip')
    pd.testing.assert_frame_equal(rec.df, golden_record().df)
    assert not len(rec.steps) and rec.facts==[]

## Disks that fail

def survives(folder, spoil, n=3):
    "Train, spoil the folder after an epoch: one warning, the record whole"
    class Spoil(Callback):
        def before_epoch(self):
            if self.epoch==1: spoil(folder)
    gcb,gnc = callbacks_into(folder)
    with pytest.warns(UserWarning) as w: fit(file_learner([gcb, gnc, Spoil()]), n)
    said = [str(o.message) for o in w if 'folder:' in str(o.message)]
    a,b = GradStatsCallback(),GradNormCallback()
    fit(file_learner([a, b]), n)
    pd.testing.assert_frame_equal(gcb.df, a.df)
    pd.testing.assert_frame_equal(gnc.df, b.df)
    return said

@contextmanager
def full_disk(f=lambda name, n: True):
    "No space for the files of which `f` of name and number says so"
    n,real = count(),os.replace
    def put(a, b):
        if f(Path(b).name, next(n)): raise OSError(28, 'No space left on device')
        real(a, b)
    with mock.patch.object(os, 'replace', put), warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        yield w

@pytest.mark.parametrize('f,n', [(lambda name, n: True, 2), (lambda name, n: n%3, 2), (lambda name, n: name.startswith('hist'), 1)],
                         ids=['all','two of three','hist'])
def test_disk_full(tmp_path, f, n):
    "One warning for each callback, nothing half written; when there is space again all is written, each row once"
    cbs = GradStatsCallback(folder=tmp_path/'a', hist=True),GradNormCallback(folder=tmp_path/'a')
    learn = file_learner(cbs)
    with full_disk(f) as w: fit(learn, 3)
    said = [str(o.message) for o in w if 'folder:' in str(o.message)]
    assert len(said)==n and all('No space' in o for o in said)
    assert len(cbs[0].stats)==18 and not list((tmp_path/'a').glob('.*'))
    fit(learn)
    same_as_callbacks(GradRecord.load(tmp_path/'a'), *cbs)
    pd.testing.assert_frame_equal(GradRecord.load(tmp_path/'a').hist_df, cbs[0].hist_df)

def test_gives_up(tmp_path, monkeypatch):
    "More rows wait than may: a second warning, the record goes on in memory"
    monkeypatch.setattr(Stream, 'limit', 40)
    gcb = GradStatsCallback(folder=tmp_path/'a')
    with full_disk() as w: fit(file_learner(gcb), 3)
    assert [re.search('cannot write|gave up', m)[0] for o in w if 'folder:' in (m := str(o.message))]==['cannot write','gave up'] and len(gcb.stats)==18

def test_taken_meanwhile(tmp_path):
    "While the folder is gone another run takes it: what that run writes is untouched, this one trains on"
    other = callbacks_into(tmp_path/'b')
    fit(file_learner(other))
    def take(d):
        shutil.rmtree(d)
        shutil.copytree(tmp_path/'b', d)
    assert all('not what this run wrote' in s for s in survives(tmp_path/'a', take))
    same_as_callbacks(GradRecord.load(tmp_path/'a'), *other)
    def build(f):
        f.unlink()
        shutil.copytree(tmp_path/'b', f/'c')
    (tmp_path/'f').write_text('')
    assert all('NotADirectory' in s for s in survives(tmp_path/'f'/'c', lambda d: build(d.parent)))   # not there at first
    same_as_callbacks(GradRecord.load(tmp_path/'f'/'c'), *other)

def test_reset(tmp_path):
    "After `reset()` a callback needs a folder of its own, and says so before it trains"
    cbs = callbacks_into(tmp_path/'a')
    learn = fit(file_learner(cbs))
    for c in cbs: c.reset()
    w = learn.model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r'already holds a record.*after `reset\(\)`, as `callback.folder`'): fit(learn)
    assert torch.equal(learn.model[0].weight, w)
    for c in cbs: c.folder = tmp_path/'b'
    fit(learn)
    same_as_callbacks(GradRecord.load(tmp_path/'b'), *cbs)

def test_removed(tmp_path):
    "The folder goes away, or something else takes its place"
    for spoil in (shutil.rmtree, _file):
        said = survives(tmp_path/spoil.__name__, spoil)
        assert len(said)==2 and all('cannot write' in s for s in said)   # one for each callback

def test_not_allowed(tmp_path):
    "A parent that is a file, as permissions do not stop root"
    (tmp_path/'f').write_text('')
    said = survives(tmp_path/'f'/'a', lambda d: None)
    assert len(said)==2 and all('cannot write' in s and 'NotADirectory' in s for s in said)

def test_tmpfs(tmp_path):
    "A disk of 64 KB"
    (d := tmp_path/'small').mkdir()
    if subprocess.run(['mount','-t','tmpfs','-o','size=64k','none',d], capture_output=True).returncode: pytest.skip('no permission to mount')
    try:
        said = survives(d/'a', lambda f: None, n=12)
        assert said and len(said)<=2 and all('No space left' in s for s in said)
        rec = GradRecord.load(d/'a')   # what got there is whole
        assert not list((d/'a').glob('.*.tmp')) and len(rec)%6==0
    finally:
        release(d/'a', schema)   # a folder that is held is in use
        subprocess.run(['umount',d], check=True)

## Other processes

ctx = mp.get_context('forkserver')

class Done(Callback):
    "Counts finished iterations where another process sees them"
    order,run_valid = 1000,False
    def __init__(self, n): self.n = n
    def after_batch(self): self.n.value += 1

def train_numbered(folder, n, accumulate, seed, epochs):
    "Its numbers depend on `seed` and `accumulate` alone"
    cbs = *callbacks_into(folder, update_every=2),Done(n),*[GradientAccumulation(20)]*accumulate
    fit(file_learner(cbs, seed=seed), epochs)
    return cbs[:2]

EVERY = 4
def forever(*args):
    torch.set_num_threads(1)
    Stream.every = EVERY
    train_numbered(*args, epochs=100_000)

def beginning(part, whole):
    "`part` is the first rows of `whole`, all of an iteration or none"
    if not len(part): return
    assert part['iteration'].iloc[-1]<whole['iteration'].iloc[len(part)]
    plain = lambda d: d.astype({c:object for c in d if d[c].dtype=='category'})
    pd.testing.assert_frame_equal(plain(part), plain(whole.iloc[:len(part)]), check_dtype=False, check_exact=True)

@pytest.mark.slow
def test_killed(tmp_path):
    "kill -9 at random moments of 20 runs"
    rng,lost = random.Random(0),[]
    for seed in range(20):
        d,n,acc = tmp_path/str(seed),ctx.Value('q', 0, lock=False),seed%2
        p = ctx.Process(target=forever, args=(d, n, acc, seed))
        p.start()
        while not n.value and p.is_alive(): time.sleep(.001)
        time.sleep(rng.uniform(0, .4))
        p.kill(); p.join()
        assert p.exitcode==-9
        rec,(gcb,gnc) = GradRecord.load(d),train_numbered(None, SimpleNamespace(value=0), acc, seed, n.value//6+2)
        for part,whole in ((rec.df,gcb.df), (rec.steps,gnc.df), (rec.by(),gnc.by())): beginning(part, whole)
        assert undated(rec.facts)==json.loads(json.dumps(undated(gcb.record.facts)))
        lost.append((n.value-len(rec), n.value//(1+acc)-len(rec.steps)))
    assert np.max(lost)<=EVERY+1 and np.min(lost)>=-1 and len(set(lost))>3, lost

def claim_all(folder, barrier, queue):
    "Try to take 50 folders at the same time as another process"
    won = []
    for i in range(50):
        barrier.wait(30)
        try:
            claim(folder/str(i), ['steps'])
            won.append(i)
        except ValueError as e: assert re.search('already holds a record|taken by another process', str(e)), e
    with pytest.raises(ValueError, match='already holds a record'): GradNormCallback(folder=folder/'taken')
    queue.put(won)

def test_race(tmp_path):
    "Of two processes that want a folder, one gets it"
    claim(tmp_path/'taken', ['tensors'])
    b,q = ctx.Barrier(2),ctx.Queue()
    ps = [ctx.Process(target=claim_all, args=(tmp_path, b, q)) for _ in range(2)]
    for p in ps: p.start()
    won = [q.get(timeout=60) for _ in ps]
    for p in ps: p.join()
    assert sorted(sum(won, []))==list(range(50)) and [p.exitcode for p in ps]==[0,0]
    assert all(json.loads((tmp_path/f'{i}'/'gradstats.json').read_text())['format']==1 for i in range(50))

class HalfOfBatch(Callback):
    "Each rank works on its half of the batch"
    order = -7
    def before_batch(self): self.learn.xb,self.learn.yb = ([t.chunk(2)[torch.distributed.get_rank()] for t in b] for b in (self.xb,self.yb))

class Ready(Callback):
    "The first rank is training and has claimed the folder"
    order,run_valid = 0,False
    def __init__(self, event): self.event = event
    def before_batch(self): self.event.set()

parallel_wraps = dict(ddp=torch.nn.parallel.DistributedDataParallel)
if fsdp_runs_here: parallel_wraps['fsdp'] = lambda m: fully_shard(m, mesh=init_device_mesh('cpu', (2,)), reshard_after_forward=True)

def train_rank(r, folder, events, queue):
    "One of two ranks; the second makes its callbacks when the first is training"
    os.environ.update(RANK=str(r), WORLD_SIZE='2')
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=r, world_size=2, timeout=timedelta(seconds=60))
    for how,e in events.items():
        learn = file_learner([HalfOfBatch(), Ready(e)])
        learn.model = parallel_wraps[how](learn.model)
        if r: assert e.wait(60)
        gcb,gnc = callbacks_into(folder/how, show=True)
        fit(learn.add_cbs([gcb, gnc]), 2)
        queue.put((how, r, [[float(v) for v in o] for o in learn.recorder.values], gcb.df, gnc.df))
    torch.distributed.destroy_process_group()

def test_ranks(tmp_path):
    "Two ranks that name one folder: the first writes; both see the same `grad_norm`"
    events,q = {how:ctx.Event() for how in parallel_wraps},ctx.Queue()
    ps = [ctx.Process(target=train_rank, args=(r, tmp_path, events, q)) for r in (0,1)]
    for p in ps: p.start()
    got = [q.get(timeout=90) for _ in range(2*len(parallel_wraps))]
    for p in ps: p.join()
    one = GradNormCallback()
    fit(file_learner(one), 2)
    for how in parallel_wraps:
        (_,_,a,gdf,ndf),(_,_,b,rest,_) = sorted((o for o in got if o[0]==how), key=lambda o: o[1])
        rec = GradRecord.load(tmp_path/how)
        pd.testing.assert_frame_equal(rec.df, gdf)
        pd.testing.assert_frame_equal(rec.steps, ndf)
        assert {f.name.split('-')[1] for f in (tmp_path/how).glob('*.parquet')}=={'0'} and not len(rest)
        want = one.df.groupby('epoch')['norm'].mean()
        for v in (a,b): np.testing.assert_allclose([o[-1] for o in v], want, rtol=1e-5)

class OneEpoch(Callback):
    def before_batch(self):
        if self.training and self.epoch==1: raise CancelTrainException('not this one')

@pytest.mark.parametrize('cancel,missing', [(TrainOnly, {1:[2,3],0:[2,3]}), (OneEpoch, {1:[1,4]})])
def test_show_cancelled(cancel, missing):
    "A cancelled training or validation leaves NaN in its own columns; `validate` is untouched"
    learn = file_learner([GradNormCallback(show=True), cancel()], metrics=accuracy)
    fit(learn, 2)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','accuracy','grad_norm','time']
    for i,v in enumerate(learn.recorder.values):
        assert len(v)==4 and [j+1 for j,o in enumerate(v) if np.isnan(o)]==missing.get(i, [])
    if cancel is OneEpoch: np.testing.assert_allclose(learn.recorder.values[1][1:3], learn.validate(), rtol=1e-6)

def test_show_interrupted():
    "Ctrl-C in the second epoch: one column as before, no metric left behind"
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.epoch==1: raise KeyboardInterrupt
    learn = file_learner(GradNormCallback(show=True), metrics=accuracy)
    with pytest.raises(KeyboardInterrupt): fit(learn, 2, cbs=Stop())
    assert len(learn.metrics)==1 and len(learn.validate())==2
    fit(learn)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','accuracy','grad_norm','time'] and len(learn.recorder.values[-1])==4

def test_show_stops():
    "Two columns stand side by side, and EarlyStoppingCallback watches them"
    learn = file_learner([GradNormCallback(show=True), GradNormCallback(show=True)])
    fit(learn, 8, cbs=EarlyStoppingCallback(monitor='grad_norm', comp=np.greater, patience=2))
    v = np.array([list(o) for o in learn.recorder.values])
    assert v.shape==(3,4) and (v[:,2]==v[:,3]).all() and (np.diff(v[:,2])<0).all()
