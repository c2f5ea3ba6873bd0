"Random sequences of what an engine can be asked for, against numpy on copies; distributions that are hard to sum; what once went wrong."
import math,warnings
import numpy as np,pytest,torch
from torch import tensor
from fastai_gradstats import by_blocks,by_gpu_kernel,buffer,gpu_launch,histogram
from fastai_gradstats.by_blocks import BLOCK,CHUNK,SMALL
from fastai_gradstats.engine import Engine
from fastai_gradstats.histogram import octaves
from fastai_gradstats.stats import ABOVE,DOT,MAX,NONFINITE,SUM_SQ,W_SQ,finish
from helpers.callbacks import each_reader_and_gpu,read_by
from helpers.oracles import as_float64,compare_row

cpu = torch.device('cpu')

def engine_floats(e):
    "Of all rows: max_abs, mean_abs, norm, mean, std, extra"
    e.commit()
    got = e.fetch()
    return finish(got.sums, got.numel)[0]

# --- random sequences

def values(rng, n):
    x,p = rng.standard_normal(n),rng.random(n)
    return [x, x*(p>.7), np.full(n, rng.choice([.1,-3e38,1e-45,1e-16,1e16])), 10.**rng.uniform(-45, 38, n)*np.sign(x), np.where(p==p.max(initial=0), 1, 2e-4*x), 1e-3*x-100,
            np.where(p<.01, np.nan, x), np.where(p<.01, -np.inf, x), -0.*np.abs(x), np.where(p<.5, 1e-45, -0.), 1+np.round(x)*2**-23, 2.**np.round(9*x), (-1.)**np.arange(n), np.sort(x**8), x*1e37][rng.integers(15)]

def gradient(rng):
    "A tensor of any size, dtype and layout"
    n = int(rng.choice([0,1,2,7,64,1000,1024,1025,4097,20_000] + [SMALL,SMALL+1,BLOCK,BLOCK+1]*(rng.random()<.15)))
    dtype = [torch.float32,torch.float32,torch.float32,torch.float64,torch.bfloat16,torch.float16][rng.integers(6)]
    t,how = torch.from_numpy(values(rng, n)).to(dtype),rng.integers(9)
    if how==0 and n: return t[0]
    if how==1 and n>23: return t[:n//24*24].view(-1,3,2,4).contiguous(memory_format=torch.channels_last)
    if how==2 and 0<n<2000: return t[:,None].expand(-1,3)
    if how==3: return t[::2]
    if how==4: return torch.sparse_coo_tensor(torch.arange(n)[None]*2, t, (2*n+1,), check_invariants=True)
    if how==5 and dtype.itemsize>2: return torch.complex(t, t).conj().imag
    if how==6 and dtype.itemsize>2 and t.isfinite().all(): return torch.complex(t, t.flip(0))
    return t

class Rows:
    "An engine beside a list of what its rows should be: (key, gradient, weights, are all sums wanted?)"
    def __init__(self, hist=False, **kw):
        self.e,self.rows,self.committed,self.hist,self.notes = Engine(hist=hist, **kw),[],0,hist,[]
        self.e.buffer(cpu)
    def put(self, rng):
        g,k,scale = gradient(rng),int(rng.integers(9)),2.**rng.integers(0, 20)
        scaled = scale>2**9
        with torch.no_grad(): self.e.put(k, g, tensor(scale) if scaled else None)
        self.rows.append((k, as_float64(g)/scale if scaled else as_float64(g), None, True))
    def put_all(self, rng):
        full = bool(rng.random()<.6)
        gs = [gradient(rng) for _ in range(rng.integers(1, 9))]
        ws = [torch.randn(g.shape).to(g.dtype).requires_grad_() for g in gs]
        keys = rng.integers(0, 9, len(gs)).tolist()
        self.e.put_all(keys, gs, ws, full)
        odd,double = (lambda g: g.layout!=torch.strided or g.is_complex()),(lambda g: g.dtype==torch.float64)
        first = next((double(g) for g in gs if not odd(g)), None)
        o = sorted(zip(keys, gs, ws), key=lambda o: 0 if odd(o[1]) else 1 if double(o[1])==first else 2)   # as they are grouped
        self.rows += [(k, as_float64(g), as_float64(w), full) for k,g,w in o]
    def discard(self, rng):
        m,n = self.e.mark(),len(self.rows)
        self.put_all(rng)
        self.e.discard(m)
        del self.rows[n:]
    def rename(self, rng):
        m,n = self.e.mark(),len(self.rows)
        self.put_all(rng)
        self.e.rename(m, self.e.mark(), -7)
        self.rows[n:] = [(-7, *o) for _,*o in self.rows[n:]]
    def drop(self, rng):
        keys = {int(k) for k in rng.integers(9, size=2)}
        self.e.drop(keys)
        self.rows[self.committed:] = [o for o in self.rows[self.committed:] if o[0] not in keys]
    def commit(self):
        self.e.commit(len(self.rows)-self.committed)
        self.notes.append(len(self.rows)-self.committed)
        self.committed = len(self.rows)
        assert not self.e.pending()
    def check(self):
        notes,n,keys,numel,s,h = self.e.fetch()
        f,c = finish(s, numel)
        assert notes==n.tolist()==self.notes
        assert keys.tolist()==[k for k,*_ in self.rows[:self.committed]] and n.sum()==self.committed
        for i,(_,g,w,full) in enumerate(self.rows[:self.committed]): check_engine_row(g.ravel(), w, s[i], f[:,i], c[:,i], h[i] if self.hist and full else None, not full)
        self.rows,self.committed,self.notes = self.rows[self.committed:],0,[]

@np.errstate(all='ignore')
def check_engine_row(g, w, s, f, c, h, norms_only):
    "One row"
    ok = np.isfinite(g).all()
    if norms_only: np.testing.assert_allclose([s[SUM_SQ],s[NONFINITE]], [np.square(np.abs(g)).sum(),(~np.isfinite(g)).sum()], rtol=2e-5)
    elif ok or not np.iscomplexobj(g):
        compare_row(dict(zip(['max_abs','mean_abs','norm','mean','std','numel','zeros','nonfinite','above'], [*f,*c]), name='row'), g)
    if w is not None and ok:
        w = w.ravel()
        np.testing.assert_allclose(s[W_SQ], np.square(np.abs(w)).sum(), rtol=2e-5)
        assert abs(s[DOT]-(g.conj()*w).real.sum())<=1e-5*np.abs(g*w).sum()+1e-40
    x = np.abs(g)
    if h is not None: assert octaves(h[None])[2].sum()==((x>=2.**-149)&(x<2.**128)).sum()

# A GPU's kernels, interpreted, are slow
random_sequences = [(seed,reader) for seed in range(12) for reader in ('kernel','blocks','rows')]
random_sequences += [pytest.param(seed, 'gpu', marks=() if seed in (4,6) else pytest.mark.battery) for seed in range(12)]

@pytest.mark.parametrize('seed,by_rows', random_sequences, indirect=['by_rows'])
@pytest.mark.filterwarnings('ignore:Sparse')
def test_random_sequences(seed, by_rows):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    for o in (Rows('all', by_rows=by_rows), Rows(by_rows=by_rows)):
        for _ in range(14):
            match rng.integers(9):
                case 0|1: o.put(rng)
                case 2|3: o.put_all(rng)
                case 4: o.discard(rng)
                case 5: o.rename(rng)
                case 6: o.drop(rng)
                case 7: o.commit()
                case _: o.check()
        o.commit()
        o.check()

# --- hard sums

def hard_values(n):
    "Values whose float32 sums go wrong: one huge among many that vanish beside it, halves of two sizes, constants, ulps apart"
    huge,i = np.full(n, 5.9e-8**.5),np.arange(n)
    huge[0] = 1
    return dict(huge=huge, halves=np.where(i<n//2, 1, .01), tenths=np.full(n, .1), alternating=(-1.)**i*.1,
                sorted=np.linspace(1, 0, n)**4, ulps=1+i%5*2**-23, powers=2.**-(i%60), subnormal=i%9*1e-45,
                faint=np.linspace(1, 2, n)*1e-21)

hard_sums = [(n,reader) for n in (10, SMALL, SMALL+1, BLOCK+1) for reader in ('kernel','blocks','rows')]
hard_sums += [pytest.param(3_000_000, reader, marks=pytest.mark.slow) for reader in ('kernel','blocks','rows')]
hard_sums += [(n,'gpu') for n in (10, SMALL, SMALL+1)]
hard_sums += [pytest.param(530_000, 'gpu', marks=pytest.mark.battery)]   # more chunks than are merged at a time

@pytest.mark.parametrize('n,by_rows', hard_sums, indirect=['by_rows'])
@pytest.mark.parametrize('how', hard_values(1))
def test_hard_sums(how, n, by_rows): check_hard_sums(how, n, by_rows)

@pytest.mark.slow
@pytest.mark.parametrize('how', hard_values(1))
def test_long_chunks(how, monkeypatch):
    "As a GPU's kernels take millions of elements: eight steps to a program, and more chunks than are merged at a time"
    monkeypatch.setattr(by_gpu_kernel, 'MOST_PROGRAMS', 1)
    monkeypatch.setitem(gpu_launch.SIZES, 'merge', 4)
    with read_by('gpu') as by_rows: check_hard_sums(how, 70_000, by_rows)

@pytest.mark.battery
@pytest.mark.parametrize('by_rows', ('gpu',), indirect=True)
def test_many_hard_sums(by_rows): check_hard_sums('huge', 3_000_000, by_rows)

def check_hard_sums(how, n, by_rows):
    x = tensor(hard_values(n)[how], dtype=torch.float32)
    e,norms = (Engine(by_rows=by_rows) for _ in range(2))
    for o in (e,norms): o.put_all([0], [x], [x], full=o is e)
    g,f = as_float64(x),engine_floats(e)[:5,0]
    np.testing.assert_allclose(f[[0,1,2]], np.float32([g.max(), np.abs(g).mean(), np.linalg.norm(g)]), rtol=1e-5, atol=1e-45)
    np.testing.assert_allclose(f[3], g.mean(), rtol=0, atol=1e-6*np.abs(g).mean()+1e-45)
    rows = 1+n//(1024 if by_rows else BLOCK)   # a spread below the last digits of the mean: each row's sum adds an error of float64
    np.testing.assert_allclose(f[4], g.std(), rtol=1e-5, atol=(1e-7+np.sqrt(rows*2**-54) if by_rows else np.sqrt((rows-1)*2**-54))*np.abs(g).mean()+1e-45)
    np.testing.assert_allclose(engine_floats(norms)[2,0], np.linalg.norm(g), rtol=1e-5, atol=1e-45)

# --- what once went wrong

@each_reader_and_gpu
@pytest.mark.parametrize('hist', (False, True, 'all'))
@pytest.mark.parametrize('dtype', (torch.float32, torch.float64, torch.complex64))
def test_empty(dtype, hist, by_rows):
    e,g = Engine(by_rows=by_rows, hist=hist),torch.empty(0, 3, dtype=dtype)
    with torch.no_grad(): e.put(0, g)
    e.put_all([0], [g], [g])
    assert engine_floats(e)[0].tolist()==[0,0]

@each_reader_and_gpu
def test_scale_changes(by_rows):
    "Rows that wait keep the scale they came with, also where a sparse gradient without one comes next"
    e = Engine(by_rows=by_rows)
    for s in (2.,1024.,8.):
        e.put(0, torch.full((10,), s), tensor(s))
    e.put_all([1], [torch.ones(5).to_sparse()])
    e.put(2, torch.ones(10))
    assert engine_floats(e)[0].tolist()==[1]*5

@each_reader_and_gpu
def test_complex_with_scale(by_rows):
    "Divided by it, counted without it, and with the user's own statistics"
    e = Engine(by_rows=by_rows, extra=dict(top=lambda g: g.abs().max()))
    e.put(0, torch.full((10,), 768j), tensor(1024.))
    e.commit()
    _,_,_,n,s,_ = e.fetch()
    assert s[0,[MAX,ABOVE,-1]].tolist()==[.75,0,.75] and finish(s, n)[0][2,0]==np.float32(.75*10**.5)

@each_reader_and_gpu
@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
def test_lazy_minus(dtype, by_rows):
    e,g = Engine(by_rows=by_rows),torch.full((SMALL+1,), 2-3j).to(torch.complex(tensor(0., dtype=dtype), tensor(0., dtype=dtype)).dtype).conj().imag
    assert g.is_neg()
    e.put_all([0,1], [g,g[:1]])
    assert engine_floats(e)[3].tolist()==[3,3]

@each_reader_and_gpu
@pytest.mark.parametrize('n', (100, SMALL+1, BLOCK+CHUNK+1))
def test_sparse_norms(n, by_rows):
    "Values that come one by one, for norms only"
    e,g = Engine(by_rows=by_rows),torch.linspace(-3, 4, n)
    e.put_all([0,1], [g.to_sparse(), g.to_sparse()*1e30], [g, g], full=False)
    np.testing.assert_allclose(engine_floats(e)[2], [np.linalg.norm(as_float64(g)), 1e30*np.linalg.norm(as_float64(g))], rtol=2e-5)

@each_reader_and_gpu
@pytest.mark.parametrize('hist', (False, True))
@pytest.mark.parametrize('n', (9, SMALL+1))
def test_default_dtype_and_device(n, hist, by_rows):
    "The user's defaults are for the user's tensors"
    x = torch.linspace(-3, 3, n, dtype=torch.float32)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device('meta'):   # as `set_default_device`, after which torch 2.6 has no `get_default_device` any more
            e = Engine(hist=hist, by_rows=by_rows)
            e.put_all([0], [x], [x])
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_allclose(engine_floats(e)[:5,0],
                               [3, np.abs(as_float64(x)).mean(), np.linalg.norm(as_float64(x)), 0, as_float64(x).std()], rtol=1e-5,
                               atol=1e-6)

@pytest.mark.parametrize('mean', (1e3, 1e7, 1e9))
def test_double_far_from_zero(mean):
    "Blocks are put together without cancellation"
    torch.manual_seed(0)
    x = mean+torch.randn(4*BLOCK+7, dtype=torch.float64)
    e = Engine()
    e.put(0, x)
    np.testing.assert_allclose(engine_floats(e)[4,0], as_float64(x).std(), rtol=1e-6)

@each_reader_and_gpu
@pytest.mark.parametrize('dtype', (torch.float32, torch.float16, torch.float64))
def test_infinities_in_two_blocks(dtype, by_rows):
    e,x = Engine(by_rows=by_rows),torch.ones(BLOCK+5, dtype=dtype)
    x[0],x[-1] = math.inf,-math.inf
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        e.put(0, x)
    f = engine_floats(e)[:,0]
    assert f[0]==math.inf and f[2]==math.inf and np.isnan(f[3])

def test_committed_stays():
    "What was put and not committed is forgotten; what is committed is never discarded, whatever savepoint is named"
    e,x = Engine(),torch.ones(5)
    e.put(0, x), e.commit('a')
    e.put(1, x)
    e.discard({})
    e.put(2, 2*x), e.commit('b')
    e.discard({})
    notes,ns,keys,_,s,_ = e.fetch()
    assert (notes,ns.tolist(),keys.tolist(),s[:,MAX].tolist())==(['a','b'],[1,1],[0,2],[1,2])

@each_reader_and_gpu
def test_some_with_weights(by_rows):
    "Rows without weights have no products, also where their neighbours do"
    e,x = Engine(by_rows=by_rows),torch.full((10,), 3.)
    e.put_all(range(9), [x]*9, [x]*9)
    e.discard()
    e.put_all([0,1], [x, torch.full((SMALL+1,), 3.)], [x, torch.full((SMALL+1,), 3.)])
    with torch.no_grad(): e.put(2, x), e.put(3, torch.full((SMALL+1,), 3.))
    e.put_all([4], [x])
    e.commit()
    assert e.fetch().sums[:,[W_SQ,DOT]].tolist()==[[90,90], [9*(SMALL+1)]*2, *[[0,0]]*3]

@each_reader_and_gpu
def test_sparse_products(by_rows):
    "In double precision: neither rounded to bfloat16 nor beyond float32"
    e,g = Engine(by_rows=by_rows),torch.linspace(1, 2, 99).bfloat16()
    big = torch.full((9,), 1e38+1e38j)
    e.put_all([0,1], [g.to_sparse(), big], [g.flip(0), big])
    e.commit()
    np.testing.assert_allclose(e.fetch().sums[:,DOT], [as_float64(g)@as_float64(g)[::-1], 9*2*float(np.float32(1e38))**2], rtol=1e-12)

@pytest.mark.parametrize('by_rows', ('blocks',), indirect=True)
@pytest.mark.parametrize('f', ('segment_sums', 'segment_products'))
def test_interrupt(f, by_rows, monkeypatch):
    "One that comes while the pool is summed loses nothing"
    e,gs = Engine(),[torch.full((100,), 2.), torch.full((7,), 3.)]
    e.put_all([0,1], gs, gs)
    e.commit()
    def stop(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(by_blocks, f, stop)
        with pytest.raises(KeyboardInterrupt): e.fetch()
    s = e.fetch().sums
    assert s[:,MAX].tolist()==[2,3] and s[:,DOT].tolist()==s[:,W_SQ].tolist()==s[:,SUM_SQ].tolist()==[400,63]

@each_reader_and_gpu
def test_threshold_beyond_float32(by_rows):
    e = Engine(1e39, by_rows=by_rows)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        e.put_all([0,1], [torch.full((9,), 3e38), torch.full((9,), torch.inf)])
        e.commit()
        assert e.fetch().sums[:,ABOVE].tolist()==[0,9]

def test_caches_are_bounded():
    for n in range(1, 6000): histogram.stride_of(n), buffer.floor32(float(n))
    assert histogram.stride_of.cache_info().currsize<=2**12 and buffer.floor32.cache_info().currsize<=2**10
