"Histograms against numpy, the bound of a record, and what the engine of a GPU asks of its device."
import gc,tracemalloc
from random import Random
import numpy as np,pytest,torch
from torch.utils._python_dispatch import TorchDispatchMode
from fastai_gradstats import GradStatsCallback,GradRecord,digits_learner
from fastai_gradstats.engine import Engine
from fastai_gradstats.histogram import DROP,LOWEST,SAMPLE,octaves,stride_of
from fastai_gradstats.stats import SUM_SQ
from fastai_gradstats.stores import Rows,counts,floats
from helpers.callbacks import each_reader
from helpers.oracles import GradSpy,octaves_by_numpy
from helpers.training import fit

def octave_counts(g, hist='all', scale=None, **kw):
    "Elements per octave of one gradient"
    e = Engine(hist=hist, **kw)
    e.put(0, g, torch.tensor(scale) if scale else None)
    e.commit()
    n,o,c = octaves(e.fetch().octaves)
    assert len(n)==1 and n[0]==len(o)
    return dict(zip(o.tolist(), c.tolist()))

@each_reader
@pytest.mark.parametrize('dtype', (torch.float32, torch.float16, torch.bfloat16, torch.float64))
@pytest.mark.parametrize('n', (1, 5, SAMPLE, SAMPLE+1, 300_000))
def test_all_elements(n, dtype, by_rows):
    g = torch.Generator().manual_seed(n)
    x = (torch.randn(n, generator=g)*10**torch.randint(-6, 4, (n,), generator=g)).to(dtype)
    x[::7] = 0
    if n>2: x[1],x[2] = torch.nan,torch.inf
    assert octave_counts(x, by_rows=by_rows)==octaves_by_numpy(x)

@each_reader
@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16, torch.float64))
def test_same_sample(dtype, by_rows):
    "At most `SAMPLE` elements, the same ones whatever reads them, also where a tensor is converted in pieces"
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(0), dtype=dtype)
    e,rng,s = Engine(hist=True, by_rows=by_rows),Random(0),stride_of(len(x))
    for i in range(3):
        e.put(0, x)
        e.commit()
        part = octaves_by_numpy(x[int(rng.random()*s)::s])
        n,o,c = octaves(e.fetch().octaves)
        assert dict(zip(o.tolist(), (c//s).tolist()))==part and sum(part.values())<=SAMPLE

@each_reader
def test_more_rows_than_the_first_buffer(by_rows):
    e,x = Engine(hist='all', by_rows=by_rows),2.**torch.arange(-3, 4)
    for i in range(3000): e.put(i, x)
    e.commit()
    n,o,c = octaves(e.fetch().octaves)
    assert n.tolist()==[7]*3000 and o.tolist()==[*range(-3, 4)]*3000 and (c==1).all()

def test_edges():
    "Powers of two and one ulp below; the smallest and largest numbers; zeros and what is not finite apart"
    p = 2.**torch.arange(-149, 128, dtype=torch.float64)
    x = torch.cat([p.float(), -p.float(), torch.nextafter(p.float(), torch.tensor(0.)), torch.tensor([0., -0., torch.inf, -torch.inf, torch.nan, 3.4e38])])
    assert octave_counts(x)==octaves_by_numpy(x)
    assert octave_counts(torch.zeros(9))=={} and octave_counts(torch.full((9,), torch.nan))=={} and octave_counts(torch.empty(0))=={}

def test_amp_scale():
    g = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert octave_counts(g*2**12, scale=2.**12)==octaves_by_numpy(g)

@pytest.mark.parametrize('shape', ((64,64,3,3), (512,288), (7,4099)))
def test_sample_is_unbiased(shape):
    "One position of each 3x3 kernel is 1000 times larger: over many draws the mean count of its octaves is right, as is the sum of all"
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x.view(-1)[4::9] *= 1000
    e = Engine(hist=True)
    for i in range(200): e.put(0, x)
    e.commit()
    h = e.fetch().octaves
    h = h[:,:DROP]
    got,all_ = h.mean(0),np.zeros(DROP)
    for o,c in octaves_by_numpy(x).items(): all_[o-LOWEST] = c
    sd = h.std(0, ddof=1)/np.sqrt(len(h))
    ok = all_>200
    assert ok.sum()>8 and (np.abs(got-all_)[ok]<5*sd[ok]+1e-9).all()
    assert abs(got.sum()-x.numel())<.01*x.numel()
    assert 0<h.std(0)[ok].max()      # a sample indeed

def test_small_tensors_are_counted_whole():
    x = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0))
    assert octave_counts(x, True)==octaves_by_numpy(x)

def test_training():
    """Of each tensor all elements that are finite and not 0, at each iteration; parameter rows those of the gradients the optimizer
    got; training is the same without"""
    def go(*cbs): return fit(digits_learner(cbs=[*cbs]))
    learn,plain = go(GradStatsCallback(hist='all'), spy := GradSpy()),go()
    assert all(torch.equal(a, b) for a,b in zip(learn.model.state_dict().values(), plain.model.state_dict().values()))
    df,h = learn.grad_stats.df,learn.grad_stats.hist_df
    key = ['iteration','kind','name']
    n = df.assign(n=df['numel']-df['zeros']-df['nonfinite']).groupby(key, observed=True)['n'].sum()
    assert (h.groupby(key, observed=True)['count'].sum()==n[n>0]).all()
    for i,gs in enumerate(spy.grads):
        for name,g in gs.items():
            r = h[(h['iteration']==i)&(h['kind']=='param')&(h['name']==name)]
            assert dict(zip(r['octave'], r['count']))==octaves_by_numpy(torch.from_numpy(g))

def test_hist_survives_keep_and_files(tmp_path):
    learn = fit(digits_learner(cbs=GradStatsCallback(hist=True, keep=6, folder=tmp_path/'a')))
    h,df = learn.grad_stats.hist_df,learn.grad_stats.df
    assert set(h['iteration'])==set(df['iteration']) and df['iteration'].nunique()<=6
    learn.grad_stats.save(tmp_path/'b')
    assert GradRecord.load(tmp_path/'b').hist_df.astype(dict(kind=str, name=str, phase=str)).equals(h.astype(dict(kind=str, name=str, phase=str)))
    disk = GradRecord.load(tmp_path/'a').hist_df       # nothing thinned there
    assert disk['iteration'].nunique()==22
    part = disk[disk['iteration'].isin(h['iteration'])].reset_index(drop=True)
    assert (part[['iteration','octave','count']]==h[['iteration','octave','count']]).all(axis=None)

# --- bounded memory

def simulate(n, keep, tensors=20, chunk=500, seed=0):
    "A record of `n` made-up iterations; spikes and NaN at known places"
    rows,rng = Rows(floats, counts, keep),np.random.default_rng(seed)
    for i in range(tensors): rows.key(i, 'param', f'p{i}')
    peaks = []
    for a in range(0, n, chunk):
        it = np.arange(a, a+chunk)
        f = np.abs(rng.normal(size=(len(floats),chunk*tensors))).astype(np.float32)
        c = np.ones((len(counts),chunk*tensors), np.uint32)
        f[:,(it==31_337).repeat(tensors)] = 1e6
        f[:,(it==77_777).repeat(tensors)] = np.nan
        rows.append(np.stack([it*0,it*0,it*0,it,it]), np.full(chunk, tensors), np.tile(np.arange(tensors), chunk), f, c)
        peaks.append(tracemalloc.get_traced_memory()[1]); tracemalloc.reset_peak()
    return rows,peaks

def test_memory_is_flat():
    "100,000 iterations with keep=1000: no more memory late than early, the spike and the NaN still there"
    tracemalloc.start()
    try: rows,peaks = simulate(100_000, 1000)
    finally: tracemalloc.stop()
    assert max(peaks[20:])<=1.25*max(peaks[:20])
    df = rows.frame()
    its = df['iteration'].unique()
    assert len(its)<=1000 and {31_337,77_777}<=set(its) and (np.diff(its)>0).all()
    assert df.groupby('iteration').size().eq(20).all()

@pytest.mark.parametrize('tensors,chunk', ((20,500), (6,10)))
def test_bytes_per_row(tensors, chunk):
    "At most 48 bytes per tensor and iteration, with all that belongs to them, in short epochs too"
    tracemalloc.start()
    try:
        rows = simulate(4000, None, tensors, chunk)[0]
        gc.collect()
        assert sum(len(p) for p in rows.parts)==4000 and tracemalloc.get_traced_memory()[0]/(4000*tensors)<=48
    finally: tracemalloc.stop()

@pytest.mark.parametrize('keep', (0, -3, 1.5, True, 'all'))
def test_bad_keep(keep):
    with pytest.raises(ValueError, match='keep'): GradStatsCallback(keep=keep)

@pytest.mark.parametrize('hist', ('some', 2, None))
def test_bad_hist(hist):
    with pytest.raises(ValueError, match='hist'): GradStatsCallback(hist=hist)

# --- the device path

class CountsKernels(TorchDispatchMode):
    "How many kernels run (a view is none), and how many operations ask the device for a number"
    def __init__(self): super().__init__(); self.ops,self.reads = 0,0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += not func.is_view
        self.reads += func.name() in ('aten::_local_scalar_dense','aten::nonzero','aten::bincount')
        return func(*args, **kwargs or {})

@pytest.mark.parametrize('weights', (False, True))
@pytest.mark.parametrize('hist', (False, True))
def test_no_read_in_a_step(hist, weights):
    "On meta tensors a read raises; operations for parameters are a constant, whatever their number (histograms copy each tensor)"
    def ops(n):
        e,gs = Engine(by_rows=True, hist=hist),[torch.randn(30,40, device='meta') for _ in range(n)]
        ws = gs if weights else None
        for _ in range(2):   # plans are made once
            with CountsKernels() as c:
                e.put_all(list(range(n)), gs, ws)
                e.commit()
        assert c.reads==0
        return c.ops
    a,b = ops(5),ops(50)
    assert b-a<=(45+16 if hist else 0), (a,b)   # the scratch of histograms is reduced every 64 tensors

def test_one_copy_per_output():
    "An output costs its copy; the sums come once an iteration"
    def ops(n):
        e = Engine(by_rows=True)
        for _ in range(2):
            with CountsKernels() as c:
                for i in range(n): e.put(i, torch.empty(8,16, device='meta'))
                e.commit()
        assert c.reads==0
        return c.ops
    a,b = ops(5),ops(50)
    assert b-a==45*2      # the test's own `empty`, and one copy

def test_plans_go_by_shape():
    "Other tensors under the same keys: the same clipped rows of another model, or after unfreezing"
    e,gs = Engine(),[torch.ones(5,3), torch.ones(4000), torch.ones(3000), torch.ones(2,2), torch.ones(7, dtype=torch.float64), torch.ones(3)]
    for i in (0,2): e.put_all([-2]*2, gs[i:i+2], full=False)
    for g in gs[4:]: e.put_all([-2], [g], full=False)
    e.commit()
    assert e.fetch().sums[:,SUM_SQ].tolist()==[15,4000,3000,4,7,3]
