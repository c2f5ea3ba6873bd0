"Put, commit, discard: an engine that is interrupted at any line, asked by two threads, or given rows of several kinds."
import threading
import numpy as np,pytest,torch

from fastai_gradstats.engine import Engine
from fastai_gradstats.histogram import octaves
from fastai_gradstats.stats import DOT,MAX,SCALE,SUM,SUM_SQ,W_SQ,ZEROS
from helpers.callbacks import CtrlC,each_reader

on_cpu = torch.device('cpu')
ROOMS = 'engine buffer by_rows by_kernel by_blocks histogram layouts'

# --- an interrupt at any line

def full_of(v, n=5): return torch.full((n,), float(v))

def work(e):
    "Three commits; each tensor's largest value is 100 times its commit and its key"
    for i in (1,2,3):
        v = 100*i
        scale = torch.tensor(2.**i)
        with torch.no_grad():
            e.put(1, full_of(v+1)*scale, scale)
            here = e.mark()
            e.put(9, full_of(999, 3000))
            e.discard(here)
            e.put(8, full_of(v+8))
            e.put(2, full_of(v+2, 9000)*scale, scale)
        e.drop({8})
        here = e.mark()
        e.put_all([3,4], [full_of(v+3), full_of(v+4, 9001).double()], [full_of(2), full_of(2, 9001).double()])
        e.put_all([0], [full_of(v+5).to_sparse()])
        e.rename({on_cpu:e.mark()[on_cpu]-1}, e.mark(), 5)
        e.number(6, torch.tensor(v+6.))
        e.put_all([7], [full_of(v+7)], full=False)
        e.commit(i)

WORK = {1:5, 2:9000, 3:5, 4:9001, 5:5, 6:None, 7:5}   # key -> elements

def check(got):
    "Commits are whole: each has its seven rows, with their sums"
    assert got.n.tolist()==[7]*len(got.notes) and got.notes==[*range(1, len(got.notes)+1)]
    owner = np.repeat(got.notes, got.n)
    for i in got.notes:
        rows = {k:r for r,k in enumerate(got.keys) if owner[r]==i}
        assert set(rows)==set(WORK)
        for key,r in rows.items():
            v,s,n = 100*i+key,got.sums[r],WORK[key]
            scale = s[SCALE] or 1
            if key!=7: assert s[MAX]/scale==v
            if n: np.testing.assert_allclose(s[SUM_SQ]/scale**2, n*v*v, rtol=1e-5)
            if key in (3,4): np.testing.assert_allclose(s[[W_SQ,DOT]], [4*n, 2*n*v], rtol=1e-5)
            assert s[ZEROS]==0
            if n and key!=7: assert octaves(got.octaves[r:r+1])[2].tolist()==[n]

@each_reader
def test_interrupted_anywhere(by_rows):
    "Before the append of a commit its rows are discarded, after it they count; nothing is left in a buffer, and the next commits are whole"
    with (whole := CtrlC(-1, ROOMS)): work(e := Engine(by_rows=by_rows, hist='all'))
    check(e.fetch())
    assert whole.n>500
    for at in range(1, whole.n, 29):
        e = Engine(by_rows=by_rows, hist='all')
        try:
            with (stop := CtrlC(at, ROOMS)): work(e)
        except KeyboardInterrupt: pass
        assert torch.is_grad_enabled(), stop.where
        e.discard()
        assert not e.pending(), stop.where
        committed = len(e.commits)
        if at%2: work(e)
        got = e.fetch()
        try:
            first = got._replace(notes=got.notes[:committed], n=got.n[:committed], keys=got.keys[:7*committed], sums=got.sums[:7*committed], octaves=got.octaves[:7*committed])
            check(first)
            if at%2: check(got._replace(notes=got.notes[committed:], n=got.n[committed:], keys=got.keys[7*committed:], sums=got.sums[7*committed:], octaves=got.octaves[7*committed:]))
        except AssertionError as error: raise AssertionError(stop.where) from error

@each_reader
def test_fetch_that_fails(by_rows, monkeypatch):
    "A device that fails while rows are read takes none with it, of either device"
    e = Engine(by_rows=by_rows)
    e.put(0, full_of(1))
    e.put_all([1], [full_of(2)])
    e.commit('a')
    b = e.buffers[on_cpu]
    with monkeypatch.context() as m:
        m.setattr(b, 'host', lambda *args: 1/0)
        with pytest.raises(ZeroDivisionError): e.fetch()
    got = e.fetch()
    assert got.notes==['a'] and got.sums[:,MAX].tolist()==[1,2]

# --- what fails leaves nothing

@each_reader
def test_failed_put_all(by_rows):
    "Of a list with one gradient that cannot be read, no row stays; what was put before it does"
    class Broken(torch.Tensor):
        def numel(self): raise RuntimeError('no numbers')
    e = Engine(by_rows=by_rows)
    e.put_all([0], [full_of(1)])
    with pytest.raises(RuntimeError): e.put_all([1,2], [full_of(2), full_of(3).as_subclass(Broken)])
    e.put_all([3], [full_of(4, 70)])
    e.commit()
    got = e.fetch()
    assert got.keys.tolist()==[0,3] and got.sums[:,MAX].tolist()==[1,4] and got.numel.tolist()==[5,70]

@each_reader
def test_extra_after_failed_reduction(by_rows, monkeypatch):
    "The user's statistics are there after processes could not be reached"
    import torch.distributed as dist
    class Mesh:
        def get_group(self, dim): return None
    class Split:
        def is_shard(self): return True
    class Shard(torch.Tensor):
        device_mesh,placements = Mesh(),(Split(),)
        def to_local(self): return self.as_subclass(torch.Tensor)
    def fails(*args, **kwargs): raise RuntimeError('gone')
    e = Engine(by_rows=by_rows, extra=dict(top=lambda g: g.max()))
    monkeypatch.setattr(dist, 'all_reduce', fails)
    with pytest.raises(RuntimeError): e.put_all([0], [full_of(1).as_subclass(Shard)])
    assert not e.pending()
    e.put(1, full_of(7))
    e.commit()
    assert e.fetch().sums[:,-1].tolist()==[7]

# --- rows of several kinds

@each_reader
@pytest.mark.parametrize('n', (5, 9000))
def test_full_and_not(n, by_rows):
    "Rows that wait together may want all sums or only those of squares"
    e,x = Engine(by_rows=by_rows, hist='all', extra=dict(top=lambda g: g.max())),full_of(3, n)
    for i in range(6): e.put_all([i], [x], [x] if i%3 else None, full=i%2==0)
    e.commit()
    got = e.fetch()
    assert got.sums[:,SUM_SQ].tolist()==[9*n]*6
    assert got.sums[:,W_SQ].tolist()==got.sums[:,DOT].tolist()==[9*n if i%3 else 0 for i in range(6)]
    assert got.sums[::2,[MAX,SUM]].tolist()==[[3,3*n]]*3
    assert got.sums[:,-1].tolist()==[3,0,3,0,3,0]                                   # the user's are of full rows
    assert octaves(got.octaves)[0].tolist()==[1,0,1,0,1,0]

@each_reader
def test_scales_side_by_side(by_rows):
    "Each row has the scale it came with, also where none and another one come between"
    e = Engine(by_rows=by_rows)
    s,t = torch.tensor(4.),torch.tensor(4.)
    with torch.no_grad():
        for i,scale in enumerate((s,None,t,s,None,None,t,t)): e.put(i, full_of(8, 5+i), scale)
    e.commit()
    assert e.fetch().sums[:,SCALE].tolist()==[4,0,4,4,0,0,4,4]

@each_reader
def test_dropped_rows(by_rows):
    "They are not fetched, and no commit counts them; those of earlier commits stay"
    e = Engine(by_rows=by_rows)
    e.put(1, full_of(1)), e.put(2, full_of(2)), e.commit('a')
    e.put(1, full_of(3)), e.put(2, full_of(4)), e.put(1, full_of(5))
    e.drop({1})
    e.commit('b')
    e.put(2, full_of(6))
    e.drop([2])
    e.commit('c')
    got = e.fetch()
    assert (got.notes,got.n.tolist(),got.keys.tolist(),got.sums[:,MAX].tolist())==(['a','b','c'],[2,1,0],[1,2,2],[1,2,4])

@each_reader
def test_any_key(by_rows):
    "Negative keys are keys"
    e = Engine(by_rows=by_rows)
    for k in (-1,-2,-9,0): e.put(k, full_of(2))
    e.commit()
    assert e.fetch().keys.tolist()==[-1,-2,-9,0]

def test_commits_without_rows():
    e = Engine()
    e.commit('nothing yet')
    e.put(0, full_of(1)), e.commit('one')
    e.commit('nothing')
    got = e.fetch(2)
    assert (got.notes,got.n.tolist())==(['nothing yet','one'],[0,1])
    assert [c.note for c in e.commits]==['nothing'] and e.fetch().n.tolist()==[0] and e.fetch().notes==[]

def test_two_devices():
    "In the order of commits, device by device inside one; a device may come late"
    meta = torch.device('meta')
    e = Engine(by_rows=True)
    e.put(0, full_of(1)), e.commit('a')
    e.buffer(meta).host = lambda start, end: np.zeros((end-start, e.buffers[meta].columns))   # there are no numbers on it
    e.put(1, torch.empty(3, device=meta)), e.put(2, full_of(2)), e.commit('b')
    e.put(3, torch.empty(3, device=meta)), e.commit('c')
    e.put(4, torch.empty(3, device=meta)), e.put(5, full_of(2))
    here = e.mark()
    e.put(6, torch.empty(3, device=meta)), e.put(7, full_of(2))
    e.discard(here)
    got = e.fetch(1)
    assert (got.notes,got.n.tolist(),got.keys.tolist())==(['a'],[1],[0])
    e.drop({5})
    e.commit('d')
    got = e.fetch()
    assert (got.notes,got.n.tolist(),got.keys.tolist())==(['b','c','d'],[2,1,1],[2,1,3,4])

# --- threads

def test_put_beside_fetch():
    "What one thread puts and commits another one fetches: each row once, in order, with its own sums"
    e,got,over = Engine(),[],threading.Event()
    def read():
        while not over.is_set(): got.append(e.fetch())
    t = threading.Thread(target=read)
    t.start()
    for i in range(1, 400):
        e.put(i, full_of(i))
        e.put_all([i,i], [full_of(i), full_of(i, 9000)])
        e.commit(i)
    over.set()
    t.join()
    got.append(e.fetch())
    assert [n for g in got for n in g.notes]==[*range(1, 400)]
    assert [k for g in got for k in g.keys.tolist()]==[v for g in got for v in g.sums[:,MAX].tolist()]==[i for i in range(1, 400) for _ in range(3)]

def test_methods_hold_the_lock():
    "No word of an engine begins while another thread has the lock"
    e,done = Engine(),[]
    x = full_of(1)
    words = [lambda: e.put(0, x), lambda: e.put_all([0], [x]), lambda: e.number(0, torch.tensor(1.)), e.mark, e.pending, e.commit, e.discard, lambda: e.drop({0}), lambda: e.rename({}, {}, 0), e.fetch]
    def say(f):
        f()
        done.append(f)
    with Engine.lock:
        threads = [threading.Thread(target=say, args=(f,)) for f in words]
        for t in threads: t.start()
        for t in threads: t.join(.02)
        assert not done
    for t in threads: t.join()
    assert len(done)==len(words)
