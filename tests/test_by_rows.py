"The path of a GPU without a kernel: what it costs, a scratch that grows, what is left in it, and what a failure leaves."
import math,sys
import numpy as np,pytest,torch
from torch import Tensor,nn
from torch._subclasses.fake_tensor import FakeTensorMode
from unittest.mock import patch as mock
from fastai_gradstats import by_rows
from fastai_gradstats.by_rows import RowBuffer,W
from fastai_gradstats.engine import Engine
from fastai_gradstats.forward import ForwardCheck
from fastai_gradstats.layouts import on_device
from fastai_gradstats.stats import DOT,MAX,SCALE,SUM,SUM_SQ,W_SQ,finish
from helpers.oracles import compare_row
from helpers.project import ROOT
from helpers.training import host
sys.path.insert(0, str(ROOT))
from benchmarks import counts,traffic
from benchmarks.peers import both

# --- what it costs

class Uploads(traffic.Bytes):
    "Counts also copies from the host"
    def clear(self):
        super().clear()
        self.uploads = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(f, types, args, kwargs)
        from_host = any(isinstance(a, Tensor) and a.is_cpu for a in args)
        self.uploads += self.on and from_host and isinstance(result, Tensor) and result.is_cuda
        return result

def uploads(cbs):
    model,batch = (lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))),(lambda: (torch.randn(8,3,4,4), torch.randint(10, (8,))))
    with mock.object(counts, 'Ops', Uploads): return counts.device_step(model, batch, cbs).uploads

@pytest.mark.skipif(not (hasattr(torch._C, '_ensureCUDADeviceGuardSet') or torch.cuda.is_available()), reason='this torch fakes a GPU only where there is one')
def test_nothing_is_sent_again(): assert uploads(both())==uploads([])

def test_sent_without_waiting():
    "A copy from pinned memory"
    pinned,sent = [],[]
    pin = lambda t: pinned.append(t) or t
    with FakeTensorMode():
        with mock.object(torch.cuda, 'is_available', lambda: True), mock.object(Tensor, 'pin_memory', pin), mock.object(Tensor, 'to', lambda t,*args,**kwargs: sent.append(kwargs)):
            on_device([1,2], torch.device('cuda'))
            on_device([1,2], host)
    assert len(pinned)==1 and sent==[dict(non_blocking=True)]*2

# --- a scratch that grows

def meta(rows): return torch.empty(rows, W, device='meta')

def test_growth_is_bounded():
    "By what is filled, by a number of rows, and by the memory of the device; what was planned for the old scratch is gone"
    e = Engine(by_rows=True)
    def after(rows):
        for i in range(rows//1000): e.put(i, meta(1000))
        e.commit()
        return e.buffers[torch.device('meta')].max_rows
    assert [after(r) for r in (8_000, 9_000, 60_000, 70_000, 5_000, 900_000)]==[8192, 16384, 16384, 24576, 24576, 65536]
    b = e.buffers[torch.device('meta')]
    assert not b.plans and [len(s) for s in b.scratch.values()]==[65536]

def test_no_growth_on_a_cpu():
    e = Engine(by_rows=True)
    for i in range(12): e.put(i, torch.ones(1000, W))
    e.commit()
    assert e.buffers[host].max_rows==2**13

@pytest.fixture
def small_buffer():
    "A buffer on the CPU that begins with 4 rows and may grow to 64"
    with mock.object(by_rows, 'room', lambda device: 64), mock.object(RowBuffer, 'max_rows', 4): yield RowBuffer(host)

def check_buffer(b, gs):
    "All rows against numpy"
    floats,integers = finish(b.read(0, len(gs))[2], np.array([g.numel() for g in gs]))
    for i,g in enumerate(gs):
        compare_row(dict(zip(['max_abs','mean_abs','norm','mean','std','numel','zeros','nonfinite','above'], [*floats[:,i],*integers[:,i]]), name=i), g.double().numpy().ravel())

@pytest.mark.parametrize('dtype', (torch.float32, torch.float64, torch.bfloat16))
def test_same_numbers_before_and_after_growth(dtype, small_buffer):
    torch.manual_seed(0)
    gs = [torch.randn(n).to(dtype) for n in (5, 3*W, 9*W+7, W, 2*W-1, 0, 40)]*3
    b = small_buffer
    for _ in range(3):
        for i,g in enumerate(gs): b.put(i, g)
        b.put_all(range(len(gs)), gs, [2*g for g in gs])
        b.end_run()
    assert 4<b.max_rows<=64
    check_buffer(b, 6*gs)
    for first in (0, 2*len(gs), 4*len(gs)):
        s = b.host(first+len(gs), first+2*len(gs))
        np.testing.assert_allclose(s[:,W_SQ], 4*s[:,SUM_SQ], rtol=1e-5)
        np.testing.assert_allclose(s[:,DOT], 2*s[:,SUM_SQ], rtol=1e-5)

def test_no_memory_for_a_larger_one(small_buffer):
    "Then the one that is there will do"
    def full(*args, **kwargs): raise torch.OutOfMemoryError
    gs = [torch.randn(3*W+1) for _ in range(9)]
    for _ in range(2):
        for i,g in enumerate(gs): small_buffer.put(i, g)
        with mock.object(torch, 'empty', full): small_buffer.enlarge(64)
        small_buffer.end_run()   # and is not asked for again
        assert small_buffer.max_rows==4
    check_buffer(small_buffer, 2*gs)

# --- what is left in the scratch

@pytest.mark.parametrize('bad', (torch.nan, torch.inf, 3e38, 0.))
def test_leftovers_do_not_matter(bad):
    "Whatever lies in the scratch behind a tensor, of an earlier one or of an interrupted copy"
    torch.manual_seed(0)
    gs = [torch.randn(n) for n in (3, W-1, W, W+1, 5000)]
    b = RowBuffer(host)
    for rows in (b.scratch_of(torch.float32), b.scratch_of(torch.float32, 1, 40)): rows.fill_(bad)
    for i,g in enumerate(gs): b.put(i, g)
    b.reduce()
    for rows in b.scratch.values(): rows.fill_(bad)
    b.put_all(range(len(gs)), gs, gs)
    b.scratch[torch.float32,0].fill_(bad)
    b.put_all(range(len(gs)), gs, full=False)
    check_buffer(b, gs)
    s = b.host(0, 3*len(gs)).reshape(3, len(gs), -1)
    np.testing.assert_array_equal(s[1,:,:W_SQ], s[0,:,:W_SQ])
    for column in (W_SQ,DOT): np.testing.assert_allclose(s[1,:,column], s[0,:,SUM_SQ], rtol=1e-5)
    np.testing.assert_allclose(s[2,:,SUM_SQ], s[0,:,SUM_SQ], rtol=1e-5)

@pytest.mark.parametrize('at', ('count_all', 'scale_rows', 'row_var'))
def test_failed_reduction(at):
    "Sums are made in place: after a failure they cannot be made again, and are not numbers; what comes next is right"
    b,gs = RowBuffer(host),[torch.full((7,), 2.), torch.full((2000,), 3.)]
    for i,g in enumerate(gs): b.put(i, g)
    with mock.object(by_rows, at, lambda *args: 1/0):
        with pytest.raises(ZeroDivisionError): b.reduce()
    assert np.isnan(b.host(0, 2)).all()
    b.discard(1)
    b.put(1, gs[1])
    b.reduce()
    assert np.isnan(b.host(0, 1)).all() and b.host(1, 2)[0,[MAX,SUM,SUM_SQ]].tolist()==[3,6000,18000]

# --- numbers

@pytest.mark.parametrize('e', range(-44, 39, 4))
@pytest.mark.parametrize('n', (1, 10, W, 3*W+5))
def test_magnitudes_of_weights(e, n):
    "Products of large numbers with small ones, and squares of both"
    torch.manual_seed(n)
    g,w = (torch.rand(n, dtype=torch.float64)+.5)*10.**e,(torch.rand(n, dtype=torch.float64)+.5)*10.**min(-e, 37)
    g,w = g.float(),w.float()
    for full in (True,False):
        b = RowBuffer(host)
        b.put_all([0], [g], [w], full)
        gs,ws = g.double(),w.double()
        np.testing.assert_allclose(b.host(0, 1)[0,[SUM_SQ,W_SQ,DOT]], [gs@gs, ws@ws, gs@ws], rtol=1e-5)

def test_scale_factors_are_powers_of_two():
    "Of every binade, and nothing overflows"
    for dtype,exponents in ((torch.float32, range(-149, 128)), (torch.float64, range(-1074, 1024))):
        top = torch.tensor([math.ldexp(1.5, e) if e>-149 or dtype==torch.float64 else math.ldexp(1, e) for e in exponents], dtype=dtype)
        factor = by_rows.scale_factor(top)
        assert (factor.frexp().mantissa==.5).all()
        assert ((top*factor)<4).all() and (top*factor>0).all()
        normal = (top>=torch.finfo(dtype).tiny) & (factor>torch.finfo(dtype).tiny) & (factor<2.**126 if dtype==torch.float32 else factor<2.**1022)
        assert ((top*factor)[normal]>=1).all() and ((top*factor)[normal]<2).all()

def test_amp_scale_and_threshold():
    "The threshold is of the gradient without the scale, which its elements still have"
    b = RowBuffer(host, threshold=.5)
    g,scale = torch.tensor([.4,.5,.6,-.6,torch.nan,-torch.inf]),torch.tensor(2.**15)
    b.put(0, g*scale, scale=scale)
    b.reduce()
    floats,integers = finish(b.host(0, 1), np.array([6]))
    assert integers[:,0].tolist()==[6,0,2,3] and b.host(0, 1)[0,SCALE]==2.**15

# --- forward

def test_order_that_changes():
    "Modules in another order, one more in the same iteration, and one that is infinite by design"
    check = ForwardCheck(Engine(by_rows=True), 3)
    def place(outputs, loss):
        for i,v in outputs: check.seen(i, torch.tensor([1.,v]))
        return check.check(torch.tensor(loss)).item()
    assert place([(0,1.),(1,torch.inf)], 1.)==2   # healthy: module 1 masks
    check.begin()
    assert place([(1,torch.inf),(0,torch.inf)], torch.inf)==1
    assert place([(2,torch.nan)], 1.)==1
    check.begin()
    assert place([(2,1.),(1,torch.inf)], torch.nan)==2
    assert place([(0,torch.nan)], torch.nan)==2
