"What a reader holds in his hands: a thread that reads while training, frames that are edited, networks that change, numbers at the edges of their types."
import copy,os,pickle,threading,time
import numpy as np,pandas as pd,pytest,torch
from torch import nn
from fastai.basics import Callback,Learner,SGD
from fastai_gradstats import GradNormCallback,GradRecord,GradStatsCallback,engine
from fastai_gradstats.engine import Engine
from fastai_gradstats.histogram import octaves
from fastai_gradstats.record import as_record
from fastai_gradstats.stores import Rows,counts,floats
from fastai_gradstats.stats import finish
from helpers.callbacks import ByRows,TrainOnly,each_reader_and_slow_gpu
from helpers.oracles import GradSpy,octaves_by_numpy
from helpers.project import run_forked
from helpers.training import fit,loaders

def reader_learner(*cbs, model=None, n=6, bs=8, seed=0, **kw):
    torch.manual_seed(seed)
    x,y = torch.randn(n*bs, 4),torch.randint(0, 3, (n*bs,))
    model = model or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return Learner(loaders(x, y, bs=bs), model, loss_func=nn.CrossEntropyLoss(), cbs=[*cbs,TrainOnly()], opt_func=SGD, **kw)

# --- a second thread

class Reader(threading.Thread):
    "Reads again and again; what it raises is kept"
    def __init__(self, *reads):
        super().__init__()
        self.reads,self.errors,self.n,self.over = reads,[],0,False
    def run(self):
        while not self.over:
            for read in self.reads:
                try: read()
                except Exception as e: self.errors.append(repr(e))
                self.n += 1
            time.sleep(.002)
    def __enter__(self): self.start(); return self
    def __exit__(self, *args): self.over = True; self.join()

def check_record_against_spy(stats, norms, spy):
    "Every parameter row and norm is what the optimizer got"
    df = stats.df[stats.df['kind']=='param']
    want = [np.linalg.norm(g) for gs in spy.grads for g in gs.values()]
    np.testing.assert_allclose(df['norm'], want, rtol=1e-5)
    assert df['name'].tolist()==[n for gs in spy.grads for n in gs]
    np.testing.assert_allclose([*norms.norms], spy.norms, rtol=1e-5)
    assert norms.df['step'].tolist()==[*range(len(spy.norms))]

@pytest.mark.parametrize('cls', (GradStatsCallback, ByRows))
def test_second_thread(cls):
    "Frames, norms, copies and pickles taken while training: nothing lost, mixed up or raised"
    hist = cls is GradStatsCallback
    stats,norms,spy = cls(**dict(hist=True) if hist else {}),GradNormCallback(),GradSpy()
    learn = reader_learner(stats, norms, spy, n=150)
    frames = lambda: stats.df,lambda: norms.norms[-1:],lambda: norms.by(),lambda: stats.hist_df if hist else None
    reads = *frames,lambda: copy.deepcopy(stats.record),lambda: pickle.dumps(norms.record)
    with Reader(*reads) as r: fit(learn)
    assert not r.errors and r.n>6
    check_record_against_spy(stats, norms, spy)

def test_second_thread_and_files(tmp_path):
    "What is on disk is what a run without a reader has"
    stats,norms,spy = GradStatsCallback(folder=tmp_path/'a'),GradNormCallback(folder=tmp_path/'a'),GradSpy()
    learn = reader_learner(stats, norms, spy, n=100)
    with Reader(lambda: stats.df, lambda: norms.df) as r: fit(learn, 2)
    assert not r.errors
    back = GradRecord.load(tmp_path/'a')
    pd.testing.assert_frame_equal(back.df, stats.df)
    pd.testing.assert_frame_equal(back.steps, norms.df)
    check_record_against_spy(stats, norms, spy)

@pytest.mark.slow
def test_two_readers_and_kept_iterations():
    "A record that is thinned while two threads read it"
    stats = GradStatsCallback(keep=20)
    with Reader(lambda: stats.df) as a, Reader(lambda: stats.summary()) as b: fit(reader_learner(stats, n=300))
    assert not a.errors+b.errors
    its = stats.df['iteration'].unique()
    assert len(its)<=20 and (np.diff(its)>0).all()
    alone = GradStatsCallback(keep=20)
    fit(reader_learner(alone, n=300))
    assert stats.df['iteration'].isin(range(300)).all() and stats.df['norm'].max()==alone.df['norm'].max()

def test_interrupted_beside_a_reader():
    "Ctrl-C while a thread reads: complete steps stay, and the next fit is recorded"
    class Stop(Callback):
        def before_batch(self):
            if self.iter==100 and self.training and not done:
                done.append(1)
                raise KeyboardInterrupt
    done,stats,norms,spy = [],GradStatsCallback(),GradNormCallback(),GradSpy()
    learn = reader_learner(stats, norms, spy, n=150)
    with Reader(lambda: stats.df, lambda: norms.df) as r:
        with pytest.raises(KeyboardInterrupt): fit(learn, cbs=Stop())
        fit(learn)
    assert not r.errors and len(spy.norms)==250
    check_record_against_spy(stats, norms, spy)

FORK = """
import multiprocessing as mp,os,threading,torch
from fastai.test_utils import synth_learner
from fastai_gradstats import GradStatsCallback,record,stores
from fastai_gradstats.engine import Engine
torch.set_num_threads(1)
stats = GradStatsCallback('param')
learn = synth_learner(cbs=stats)
with learn.no_bar(), learn.no_logging(): learn.fit(1)
rows = len(stats.df)
held,over = threading.Event(),threading.Event()
def hold():
    with Engine.lock, stores.reading, stores.lock:
        held.set()
        over.wait(60)
threading.Thread(target=hold, daemon=True).start()
assert held.wait(60)
def child():
    engine = Engine(by_rows=True)
    engine.put(0, torch.ones(3))
    engine.commit()
    engine.fetch()
    os._exit(0 if len(record.as_record(stats).df)==rows>0 else 1)
process = mp.get_context('fork').Process(target=child)
process.start()
process.join(30)
if process.exitcode is None: process.kill()
over.set()
print('exit', process.exitcode)
"""

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
def test_forked_while_somebody_reads():
    "A child that is forked while another thread holds the locks can read and record. In a process of its own: torch's threads do not survive a fork"
    out,err = run_forked(FORK)
    assert out.strip().endswith('exit 0'), out+err

def test_fetch_of_some():
    "Iterations that are closed but not asked for stay, under the numbers that they then have"
    for by_rows in (None,True):
        e = Engine(by_rows=by_rows, hist='all')
        for i in range(5):
            e.put(i, torch.full((3,), 2.**i))
            e.commit(i)
        e.put(9, torch.ones(1))   # its iteration is not over
        for first,last in ((0,2),(2,3),(3,5)):
            notes,n,keys,_,s,h = e.fetch(last-first)
            assert notes==[*range(first, last)] and n.tolist()==[1]*(last-first) and keys.tolist()==[*range(first, last)]
            assert s[:,0].tolist()==[2.**i for i in range(first, last)] and octaves(h)[1].tolist()==[*range(first, last)]
        e.commit()
        assert e.fetch().keys.tolist()==[9]

# --- what a reader changes

def spoil_frame(df):
    "What a notebook may do to a frame"
    for c in df.columns:
        if df[c].dtype.kind=='f': df[c] = np.log10(df[c].abs())
        elif df[c].dtype=='category': df[c].array[:] = df[c].array[-1]
    df.iloc[0,-2] = 0
    df.loc[df.index[1],df.columns[3]] = 7
    df.drop(df.index[2:], inplace=True)
    df.insert(0, 'mine', 1)

def record_state(rec):
    return [o.to_csv() for o in (rec.df, rec.steps, rec.by(), rec.hist_df)]+[rec.sentence(), rec.summary(), [*rec.norms], rec.breaks, rec.facts, str(rec.stats[1])]

@pytest.mark.parametrize('how', ('live','loaded','selected','compared','frame'))
def test_readers_get_copies(how, tmp_path):
    "Whatever is handed out may be changed: frames, lists, facts, rows of dicts"
    stats,norms = GradStatsCallback(hist='all'),GradNormCallback()
    rec = as_record(fit(reader_learner(stats, norms)))
    if how=='loaded': rec = GradRecord.load(rec.save(tmp_path/'a'))
    if how=='selected': rec = rec.select(phase='fit')
    if how=='frame': rec = GradRecord(mine := rec.df, steps := rec.steps, rec.by(), hist=rec.hist_df)
    if how=='compared':
        from fastai_gradstats import compare
        rec = compare({'a':rec, 'b':rec})
    want = record_state(rec)
    for get in (lambda: rec.df, lambda: rec.steps, lambda: rec.hist_df, lambda: rec.by(), lambda: rec.select(kind='param').df): spoil_frame(get())
    if how=='frame': spoil_frame(mine), spoil_frame(steps)
    for f in rec.facts:
        f['params'].clear()
        f['fit'] = 9
    rec.facts.clear()
    rec.breaks.append((0,0,0,'a','b'))
    rec.stats[0][0]['norm'] = -1
    rec.norms[0] = -1
    rec.norms.append(3)
    rec.names.clear()
    assert record_state(rec)==want

def test_live_frames_stay(tmp_path):
    "A frame that was taken stays as it was, and what is done to it later changes nothing, while the record grows over it"
    stats,norms = GradStatsCallback(),GradNormCallback()
    taken,later = [],[]
    class Take(Callback):
        order = 100
        def after_batch(self):
            taken.append((d := stats.df, d.copy(deep=True), d['max_abs'], n := norms.df, n.copy(deep=True)))
            if len(taken)%3==0:
                d,_,column,n,_ = taken.pop()
                del d
                column.iloc[0] = -1.
                spoil_frame(n)
    fit(reader_learner(stats, norms, Take(), n=40))
    for d,then,_,n,then_n in taken:
        pd.testing.assert_frame_equal(d, then)
        pd.testing.assert_frame_equal(n, then_n)
    alone = GradStatsCallback(),GradNormCallback()
    fit(reader_learner(*alone, n=40))
    pd.testing.assert_frame_equal(stats.df, alone[0].df)
    pd.testing.assert_frame_equal(norms.df, alone[1].df)

def test_norms_are_floats():
    "`norms` is a list to whoever takes it for one"
    rec = fit(reader_learner(cb := GradNormCallback())).grad_norm
    want = rec.df['norm'].tolist()
    got = rec.norms
    assert got==want and got[-1]==want[-1] and got[1:3]==want[1:3] and [*got]==want and type(got[0]) is float
    assert (got+[1.])[-1]==1. and np.array(got).tolist()==want and got.map(lambda v: 2*v)[0]==2*want[0] and len(got)==6
    with pytest.raises(IndexError): got[6]

# --- each read is up to date, and none costs more than the last

def grown_record(rec, seed, n=60):
    "Appends in bulks of random size, and now and then a new tensor or a skipped step"
    rng,it = np.random.default_rng(seed),0
    rows = rec.stores['tensors']
    ks = [rows.key(i, 'param', f'p{i}') for i in range(3)]
    for _ in range(n):
        m = int(rng.choice([1,1,2,5,40]))
        if rng.random()<.05: ks.append(rows.key(int(rng.integers(9)), 'param', f'q{it}'))
        if rng.random()<.1: rows.skip(0, 0, int(rng.integers(it+1)))
        at = np.arange(it, it+m)
        rows.append(np.stack([at*0, at*0, at*0, at, at]), np.full(m, len(ks)), np.tile(ks, m), rng.random((5,m*len(ks))).astype(np.float32), np.ones((4,m*len(ks)), np.uint32))
        it += m
        yield rng

@pytest.mark.parametrize('keep', (None, pytest.param(500, marks=pytest.mark.slow), 30))
def test_no_read_is_stale(keep):
    "A frame that grew is the frame that is made anew"
    for seed in range(2):
        rec = GradRecord(Rows(floats, counts, keep))
        for rng in grown_record(rec, seed):
            if rng.random()<.5: pd.testing.assert_frame_equal(rec.df, rec.stores['tensors'].frame())
        pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(rec)).df, rec.df)

@pytest.mark.slow
def test_reading_each_step_is_flat():
    "The norm, the last row and the frame of steps at each step: as quick after 500 steps as after 50"
    norms = GradNormCallback()
    spent = []
    class Read(Callback):
        order = 100
        def after_batch(self):
            start = time.process_time()
            norms.norms[-1]
            norms.df
            spent.append(time.process_time()-start)
    fit(reader_learner(norms, Read(), n=500, bs=1))
    early,late = np.median(spent[30:80]),np.median(spent[-100:])
    assert late<2.5*early, (early,late)

# --- the network as it is now

class BodyAndHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),nn.Linear(4, 3)
    def forward(self, x): return self.head(self.body(x).tanh())

class NanInBackward(nn.Module):
    "The gradient turns NaN in it"
    def forward(self, x):
        x = x*1.
        if x.requires_grad: x.register_hook(lambda g: g*float('nan'))
        return x

def adapter(m): m.body.append(nn.Linear(4, 4))
def layer_in_front(m): m.body.insert(0, nn.Linear(4, 4))
def renamed(m): m.body = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
def bad(m):
    m.body.append(NanInBackward())
    m.body.append(nn.Linear(4, 4))
def fewer_layers(m): m.body = nn.Sequential(nn.Linear(4, 4))

@pytest.mark.parametrize('change', (adapter, layer_in_front, renamed, bad, fewer_layers))
def test_network_changes_between_fits(change, tmp_path):
    "Rows, names and the place of a NaN are those of a run that had this network from the start; on disk too"
    def rows(stats):
        d = stats.df
        return d[d['iteration']==d['iteration'].max()][['kind','name','out','call']].astype(str).values.tolist()
    def go(before, folder):
        stats = GradStatsCallback(folder=folder)
        learn = reader_learner(stats, model=BodyAndHead())
        if before: fit(learn)
        change(learn.model)
        learn.opt = None
        fit(learn)
        return stats
    once,twice = go(False, tmp_path/'a'),go(True, tmp_path/'b')
    back = GradRecord.load(tmp_path/'b')
    assert rows(twice)==rows(once)==rows(back)
    there = [*once.names]
    assert [n for n in twice.names if n in there]==[n for n in back.names if n in there]==there
    assert [*back.names]==[*twice.names]
    if change is bad: assert once.first_nonfinite()[1:]==twice.first_nonfinite()[1:]==back.first_nonfinite()[1:]==('body.3','body.1')

# --- edges of types

@pytest.mark.parametrize('by_rows', (None, True))
@pytest.mark.parametrize('hist', (False, True))
def test_counts_beyond_32_bits(by_rows, hist, tmp_path):
    "A huge sparse embedding beside a small tensor: counts are exact in frames, files and shares"
    g = torch.sparse_coo_tensor(torch.tensor([[0,5]]), torch.full((2,64), 3.), (70_000_000,64), check_invariants=True)
    e = Engine(by_rows=by_rows, hist=hist)
    e.put(0, g)
    e.put(1, torch.ones(5))
    e.commit()
    _,n,keys,numel,s,h = e.fetch()
    f,c = finish(s, numel)
    assert c[:,0].tolist()==[g.numel(), g.numel()-128, 0, 128] and c[:,1].tolist()==[5,0,0,0]
    rec = GradRecord(Rows(floats, counts))
    rows = rec.stores['tensors']
    ks = [rows.key(i, 'param', n) for i,n in enumerate('ab')]
    small = finish(*[o[1:] for o in (s,numel)])
    assert small[1].dtype==np.uint32   # 16 bytes a row, where that is enough
    for i,(k,o) in enumerate((([ks[1]],small), (ks,(f,c)))): rows.append(np.array([[0,0,0,i,i]]).T, [len(k)], np.array(k), *o)
    back = GradRecord.load(rec.save(tmp_path/'a'))
    for r in (rec,back):
        assert r.df.query('name=="a"')[['numel','zeros','above']].values.tolist()==[[g.numel(),g.numel()-128,128]]
        assert r.share_above()==128/(g.numel()+10)

@each_reader_and_slow_gpu
@pytest.mark.parametrize('dtype', (torch.float32, torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize('scale', (None, 2.**16))
def test_octaves_of_subnormals(by_rows, dtype, scale):
    "2**octave <= |g| < 2**(octave+1) from 2**-149 on, at each power of two and on both sides of it, with AMP's scale in the gradient"
    p = 2.**torch.arange(-149, 110, dtype=torch.float64)
    x = torch.cat([p, -1.5*p, p*(1-2.**-6), p*(1+2.**-6), torch.zeros(3)])
    x = x.float().to(dtype)
    g = x if scale is None else (x.double()*scale).to(dtype)
    x = g.double()/(scale or 1)
    if dtype!=torch.float64: x = x.float()
    e = Engine(by_rows=by_rows, hist='all')
    e.put(0, g, torch.tensor(scale) if scale else None)
    e.put_all([1], [x.to(g.dtype) if scale is None else x])
    e.commit()
    n,o,c = octaves(e.fetch().octaves)
    assert dict(zip(o[:n[0]].tolist(), c[:n[0]].tolist()))==octaves_by_numpy(x)
    assert dict(zip(o[n[0]:].tolist(), c[n[0]:].tolist()))==octaves_by_numpy(x)

@each_reader_and_slow_gpu
def test_double_just_below_a_power_of_two(by_rows):
    "float64 is not rounded to float32 first"
    x = torch.tensor([1-1e-12, 2.**-126*(1-1e-12), 2.**-149, 2.**-150, 1e-300, 2.**128, 2.**128*(1-1e-12), torch.inf], dtype=torch.float64)
    e = Engine(by_rows=by_rows, hist='all')
    e.put(0, x)
    e.commit()
    n,o,c = octaves(e.fetch().octaves)
    assert dict(zip(o.tolist(), c.tolist()))==octaves_by_numpy(x)=={-1:1, -127:1, -149:1, 127:1}

# --- in bulk

class Fetches(Callback):
    "In which batches the device was read"
    order = 1000
    def __init__(self, cb): self.cb,self.at,self.n = cb,[],0
    def before_batch(self): self.n += self.training
    def before_train(self):
        own,fetch = self.cb._consumer.reader.engine,Engine.fetch
        def counted(*args):
            if self.cb._consumer.reader.live: self.at.append(self.n)
            return fetch(own, *args)
        own.fetch = counted

@pytest.mark.parametrize('cls,n,kw', ((GradStatsCallback,300,{}), (ByRows,300,{}), (GradStatsCallback,150,dict(hist=True)), (GradNormCallback,300,{})))
def test_fetched_in_bulk(cls, n, kw):
    "Hundreds of iterations at a time, whatever the number of tensors"
    layers = [nn.Linear(4, 4) for _ in range(10)]
    cb = cls(**kw)
    f = Fetches(cb)
    fit(reader_learner(cb, f, model=nn.Sequential(*layers, nn.Linear(4, 3)), n=n, bs=1))
    assert not [i for i in f.at if i<n], f.at

def test_memory_of_a_buffer_is_bounded(monkeypatch):
    "It is time to fetch before a buffer grows beyond its bound, also where an iteration has many tensors; one iteration always fits"
    assert (engine.ROWS,engine.HIST_ROWS)==(2**19,2**15)   # what the page says
    monkeypatch.setattr(engine, 'ROWS', 2**14)
    monkeypatch.setattr(engine, 'HIST_ROWS', 2**13)
    for hist,rows in ((False,2**14), (True,2**13)):
        e,x,per = Engine(hist=hist),[torch.ones(1)]*300,300
        n = 0
        while True:
            e.put_all([*range(per)], x)
            n += 1
            if e.commit(): break
        assert (n-1)*per<=rows<(n+1)*per and len(e.buffers[torch.device('cpu')].acc)<=rows
    e = Engine()
    e.put_all([*range(2**14+5)], [torch.ones(1)]*(2**14+5))
    assert e.commit() and len(e.fetch().keys)==2**14+5

# --- shuffled

def test_shuffled_frames():
    "Rows in any order make the same record"
    stats,norms = GradStatsCallback(hist='all'),GradNormCallback()
    rec = as_record(fit(reader_learner(stats, norms), 2))
    mixed = [d.sample(frac=1, random_state=0) for d in (rec.df, rec.steps, rec.by(), rec.hist_df)]
    other = GradRecord(mixed[0], mixed[1], mixed[2], hist=mixed[3])
    for f in ('df','steps','hist_df'): pd.testing.assert_frame_equal(getattr(other, f), getattr(rec, f))
    for get in (lambda r: r.log10_max(), lambda r: r.by(), lambda r: r.top()): pd.testing.assert_frame_equal(get(other), get(rec))
    assert [*other.norms]==[*rec.norms] and str(other.stats)==str(rec.stats) and other.sentence()==rec.sentence()
    nan = mixed[0].assign(nonfinite=(mixed[0]['iteration']>=3).astype(int))
    assert GradRecord(nan).first_nonfinite().iteration==3
