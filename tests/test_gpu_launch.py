"Launches on a GPU that is not there: what is handed over, on which device, what a failure leaves, and that the switch is asked at each fit."
import contextlib,os,warnings
import pytest,torch
from fastai.basics import *
from unittest import mock
from fastai_gradstats import GradNormCallback,GradStatsCallback,by_gpu_kernel,engine
from fastai_gradstats.by_gpu_kernel import SWITCH,GpuBuffer,are_wanted,device_buffer
from fastai_gradstats.by_rows import RowBuffer
from fastai_gradstats.engine import Engine
from fastai_gradstats.gpu_launch import direct_launch,launch_on
from helpers.callbacks import TrainOnly
from helpers.project import ROOT
from helpers.training import fit,host
sys.path.insert(0, str(ROOT))
from benchmarks.traffic import NoKernels

def test_what_is_handed_over():
    "The same as by Triton's own launch, but for its hooks"
    compiler = pytest.importorskip('triton.compiler.compiler', reason='the kernels of a GPU are written in Triton')
    got = []
    class Compiled:
        function,packed_metadata = 'function','metadata'
        run = staticmethod(lambda *args: got.append(args))
        def _init_handles(self): pass
        def launch_metadata(self, *args): return None
    of_triton = compiler.CompiledKernel.__getitem__(Compiled(), (7,1,1))
    of_triton(1, 2, 3, 'constant', stream=5)
    direct_launch(Compiled.run, 'function', 'metadata', lambda: 5, ('constant',))(7, 1, 2, 3)
    theirs,ours = got
    hooks = slice(7, 9)
    assert theirs[:7]==ours[:7] and theirs[9:]==ours[9:] and ours[hooks]==(None,None)

def test_device_of_a_launch():
    "Another device is made the current one only where it is not"
    there = [0]
    @contextlib.contextmanager
    def device(index):
        before = there[-1]
        there.append(index)
        yield
        there.append(before)
    got = []
    with mock.patch.object(torch._C, '_cuda_getDevice', lambda: there[-1], create=True), mock.patch.object(torch.cuda, 'device', device):
        for index in (0,1,0): launch_on(index, lambda *args: got.append((there[-1],args)))(3, 4)
    assert got==[(0,(3,4)), (1,(3,4)), (0,(3,4))] and there==[0,1,0]

@contextlib.contextmanager
def proved(kernels):
    "As where kernels were proved for the CPU"
    def prepare(device, *args, **kwargs): return kernels if are_wanted() else None
    with mock.patch.dict(by_gpu_kernel._kernels, {host:kernels}), mock.patch.object(engine, 'host_buffer', device_buffer), mock.patch.object(engine, 'prepare_kernels', prepare): yield

def switched(value): return mock.patch.dict(os.environ, {SWITCH:value})

def test_switch_at_each_fit():
    "Rows that are there stay, and positions go on"
    e,x = Engine(),torch.ones(3)
    def begins():
        e.prepare(host, [x.dtype])
        e.put(5, x)
        e.commit('a fit')
        return type(e.buffers[host])
    with proved(NoKernels()):
        with switched('0'): assert begins() is RowBuffer
        with switched('1'): assert begins() is RowBuffer   # there is a row in it
        assert e.fetch().keys.tolist()==[5,5] and e.mark()=={host:2}
        with switched('1'):
            assert begins() is GpuBuffer
            buffer = e.buffers[host]
            e.fetch()
            assert begins() is GpuBuffer and e.buffers[host] is buffer and e.mark()=={host:4}
        e.fetch()
        with switched('0'): assert begins() is RowBuffer
        found = e.fetch()
        assert found.keys.tolist()==[5] and found.sums[0,0]==1 and e.mark()=={host:5}

def test_engines_by_rows_stay():
    e = Engine(by_rows=True)
    with proved(NoKernels()), switched('1'):
        e.put(0, torch.ones(3))
        buffer = e.buffers[host]
        e.discard()
        e.prepare(host, [torch.float32])
        assert e.buffers[host] is buffer

@pytest.mark.parametrize('cbs', (lambda: [GradStatsCallback(),GradNormCallback()], lambda: [GradStatsCallback(kind='output')], lambda: [GradNormCallback()]), ids=('both','output','norm'))
def test_said_at_once(cbs):
    "A launch that fails in mid-fit is said in its batch, once, and nothing is missing"
    class Fails(Callback):
        order = -1000
        def before_batch(self):
            if self.iter==2:
                def broken(*args): raise RuntimeError('no such launch')
                for key in kernels.ready: kernels.ready[key] = broken
        def after_batch(self): said_by.append(None)
    class Looks(Callback):
        order = 1000
        def after_batch(self): said_by[-1] = sum('without kernels' in str(w.message) for w in said)
    said_by,kernels = [],NoKernels()
    batches = [(torch.randn(4,3), torch.randint(2, (4,))) for _ in range(5)]
    learn = Learner(DataLoaders(batches, batches[:1]), nn.Linear(3, 2), loss_func=nn.CrossEntropyLoss(), cbs=[*cbs(),TrainOnly(),Fails(),Looks()])
    with proved(kernels), switched('1'), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        fit(learn, 1)
    assert said_by==[0,0,1,1,1] and 'no such launch' in str(next(w.message for w in said if 'without kernels' in str(w.message)))
    record = learn.grad_norm.df if hasattr(learn, 'grad_norm') else learn.grad_stats.df
    assert record['iteration'].unique().tolist()==[*range(5)]
