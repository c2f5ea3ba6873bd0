"What `make bench-gpu` runs, without a GPU: its checks, its tables and its processes, on the CPU with interpreted kernels and a `torch.cuda` that does as if."
import os,sys,time
import pandas as pd,pytest,torch
from contextlib import ExitStack,nullcontext
from unittest import mock
from fastai.callback import fp16
from torch import Tensor,nn
from fastai_gradstats import engine
from fastai_gradstats.by_gpu_kernel import SWITCH,are_wanted
from fastai_gradstats.by_rows import RowBuffer
from helpers.project import ROOT
from helpers.training import host
sys.path.insert(0, str(ROOT))
from benchmarks import gpu
from benchmarks.models import GPT,images
from benchmarks.traffic import microseconds

def test_no_gpu(tmp_path, capsys):
    "Says so, and writes nothing"
    with mock.patch.object(torch.cuda, 'is_available', lambda: False): assert gpu.main(tmp_path/'gpu.md')==0
    assert 'no GPU' in capsys.readouterr().out and not list(tmp_path.iterdir())

def wrong(setup): raise ValueError('it is wrong')
def fine(setup): return 'all is well'

def test_a_failing_check_stops_nothing():
    said = []
    with mock.patch.object(gpu, 'checks', (wrong,fine)): assert not gpu.run_checks(gpu.Setup(host, time.time()+100, time.time()+100), said.append)
    assert [line.split(' (')[0] for line in said]==['- wrong: **failed**, ValueError: it is wrong', '- fine: all is well']
    with mock.patch.object(gpu, 'checks', (fine,)): assert gpu.run_checks(gpu.Setup(host, time.time()+100, time.time()+100), said.append)

def test_no_time_left():
    "What is not begun is named; that a check was left out is no success"
    said = []
    late = gpu.Setup(host, time.time()-1, time.time()-1)
    with mock.patch.object(torch.cuda, 'is_bf16_supported', lambda including_emulation: True):
        assert not gpu.run_checks(late, said.append) and gpu.run_tables(late, said.append)
    assert len(said)==len(gpu.checks)+2+2*3 and all('kipped' in line for line in said)

def test_race_that_would_take_too_long():
    "Is not begun"
    said = []
    slow = gpu.Setup(host, time.time()+100, time.time()+100, {'net':lambda: (nn.Linear(3, 2), (torch.randn(4, 3), torch.zeros(4, dtype=torch.long)))})
    with mock.patch.object(torch.cuda, 'is_bf16_supported', lambda including_emulation: False), mock.patch.object(gpu, 'ms_a_step', lambda learn, kind: 1000.), \
         mock.patch.object(gpu, 'host_time', lambda setup: pd.DataFrame()), mock.patch.object(gpu, 'bandwidth', lambda setup: pd.DataFrame()):
        assert gpu.run_tables(slow, said.append)
    assert 'Skipped**: 336 s' in said[-1]

def supervised(code, seconds=60):
    said = []
    return gpu.supervised([sys.executable, '-c', code], seconds, said.append),'\n'.join(said)

def test_processes():
    "One that fails, one that breaks off, and one that hangs: what they said before is kept"
    assert supervised('print(1); print(2)')==(True, '1\n2')
    assert supervised('print(1); raise SystemExit(1)')==(False, '1')
    ok,said = supervised('import os; print(1, flush=True); os.abort()')
    assert not ok and said.startswith('1\n') and 'Broken off' in said
    start = time.time()
    ok,said = supervised('import time; print(1, flush=True); time.sleep(100)', 3)
    assert not ok and said.startswith('1\n') and 'Ended' in said and time.time()-start<20

@pytest.mark.parametrize('parts', ((True,True), (False,True), (True,False)))
def test_main(parts, tmp_path):
    "Both parts run, whatever becomes of the first, and all is in the file"
    ends = iter(parts)
    def supervised(command, seconds, say):
        say(' '.join(command[-2:]))
        return next(ends)
    with mock.patch.object(torch.cuda, 'is_available', lambda: True), mock.patch.object(gpu, 'head', lambda device: '# A GPU'), mock.patch.object(gpu, 'supervised', supervised):
        assert gpu.main(tmp_path/'gpu.md')==(0 if all(parts) else 1)
    text = (tmp_path/'gpu.md').read_text()
    assert '# A GPU' in text and '--part checks' in text and '--part tables' in text and ('Not all' in text)!=all(parts)

def test_time_is_bounded(): assert sum(gpu.SECONDS.values())+len(gpu.SECONDS)*gpu.GRACE<=240

# --- all of it on a CPU

class Stream:
    def __init__(self, device=None): pass
    def synchronize(self): pass

class Graph:
    "What is captured runs once, and is not replayed"
    def replay(self): pass

class SyncMode:
    "Asking a tensor for its number raises where that is an error"
    def __init__(self): self.mode = 'default'
    def set(self, mode): self.mode = mode
    def item(self, of_torch):
        def item(t):
            if self.mode=='error': raise RuntimeError('called a synchronizing operation')
            return of_torch(t)
        return item

@pytest.fixture
def as_if():
    "The CPU in place of a GPU, read by interpreted kernels where they are wanted"
    pytest.importorskip('triton', reason='the kernels of a GPU are written in Triton')
    from helpers.gpu import gpu_buffer,in_place_of_cpu
    sync = SyncMode()
    cuda = dict(synchronize=lambda *args: None, _sleep=lambda cycles: None, Stream=Stream, stream=lambda s: nullcontext(), CUDAGraph=Graph, graph=lambda g: nullcontext(), device_count=lambda: 1,
                get_device_name=lambda device: 'CPU', set_sync_debug_mode=sync.set, is_bf16_supported=lambda including_emulation=True: True)
    with ExitStack() as stack:
        def use(obj, name, value): stack.enter_context(mock.patch.object(obj, name, value))
        kernels = stack.enter_context(in_place_of_cpu())
        def buffer(device, *args): return gpu_buffer(kernels, *args) if are_wanted() else RowBuffer(device, *args)
        use(engine, 'host_buffer', buffer)
        for name,value in cuda.items(): use(torch.cuda, name, value)
        use(Tensor, 'item', sync.item(Tensor.item))
        use(gpu, 'prepare_kernels', lambda device, *args, **kwargs: kernels)
        # float32 is wider than float16: a larger scale and larger inputs overflow it
        use(fp16, 'GradScaler', lambda device, **kwargs: torch.amp.GradScaler('cpu', **kwargs|dict(init_scale=2.**127)))
        stack.enter_context(mock.patch.dict(os.environ, {SWITCH:'1'}))
        yield kernels

def setup_for(model): return gpu.Setup(host, time.time()+10_000, time.time()+10_000, {'net':model}, sizes=(7,700), large=5003, stream=4096, batches=4, steps=(3,3), race=0)

def large_images(bs, side):
    x,y = images(bs, side)
    return 1e5*x,y

@pytest.mark.battery
@pytest.mark.parametrize('check', gpu.checks, ids=lambda check: check.__name__)
def test_checks(check, as_if):
    if check is gpu.host_is_back: as_if.ready = {key:lambda *args: None for key in as_if.ready}   # an interpreter is not back
    with mock.patch.object(gpu, 'images', large_images if check is gpu.overflow else images): check(setup_for(None))

@pytest.mark.battery
def test_checks_can_fail(as_if):
    "Where a kernel does not read what it should, or is read no more"
    read_one = as_if.get('read_one', torch.float32)
    def one_less(programs, at, head, n, *args): read_one(programs, at, head, max(n-1, 1), *args)
    as_if.ready['read_one',torch.float32] = one_less
    with pytest.raises(AssertionError, match='tensor'): gpu.right(setup_for(None))
    with pytest.raises(AssertionError, match='Not equal'): gpu.in_a_fit(setup_for(None))
    as_if.fail(RuntimeError('a launch failed'))
    with pytest.raises(RuntimeError, match='launch failed'): gpu.no_wait(setup_for(None))

@pytest.mark.battery
def test_gpt_trains():
    "The loss of tokens that follow one another falls"
    torch.manual_seed(0)
    model,x = GPT(1, 16, 10, 8),torch.arange(8)[None].repeat(4, 1)
    opt = torch.optim.Adam(model.parameters(), .01)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), x+1)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1]<.2*losses[0]
    with torch.no_grad(): assert torch.allclose(model(x)[...,:4], model(x[:,:4]), atol=1e-5)   # no look ahead

@pytest.mark.battery
def test_what_else_runs(as_if, capsys):
    "On a second device, and at the head of the page"
    gpu.reads_there(host)
    assert 'CPU, torch' in gpu.head(host)
    with mock.patch.object(gpu, 'checks', (fine,)): assert gpu.run_part('checks', host, 100)
    assert 'all is well' in capsys.readouterr().out

def test_models_fit_their_batches():
    with torch.device('meta'):
        for name,make in gpu.cases.items():
            model,(x,y) = make()
            assert nn.functional.cross_entropy(model(x), y).shape==(), name
    assert 34e6<sum(p.numel() for p in model.parameters())<37e6

@pytest.mark.battery
def test_tables(as_if):
    "A row for each kind, of which ours were read as they should; what is not installed is a note"
    said = []
    few = lambda f, after, rounds: microseconds(f, after, calls=2, rounds=1)
    with mock.patch.object(gpu, 'microseconds', few): all_right = gpu.run_tables(setup_for(lambda: (gpu.small_net(), images(2, 4))), said.append)
    text = '\n'.join(said)
    assert all_right, text
    assert len(said)==4 and 'ailed' not in text
    for precision in ('fp32','bf16'):
        for kind in gpu.kinds: assert f'| {precision} | {kind} |' in text
