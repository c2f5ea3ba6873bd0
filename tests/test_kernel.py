"The compiled read: where it is used, where not, and that nobody notices which."
import os,shutil,sys
import pytest,torch
from fastai.basics import *
from torch.utils._pytree import tree_map
from fastai_gradstats.by_blocks import BLOCK
from fastai_gradstats.engine import Engine
from fastai_gradstats.stats import DOT,MAX,SUM_SQ,W_SQ,ZEROS,finish,measure
from helpers.project import ROOT,run_command,run_forked

pytest.importorskip('numba')

training_code = """
import sys,torch
from fastai.basics import *
from fastai_gradstats import GradNormCallback,GradStatsCallback,by_kernel,engine
def learner():
    set_seed(0)
    x,y = torch.randn(40,6),torch.randint(3, (40,))
    ds = L(zip(x,y))
    cbs = [GradStatsCallback(hist=True), GradNormCallback()]
    return Learner(DataLoaders(DataLoader(ds, bs=8), DataLoader(ds[:8], bs=8)), nn.Sequential(nn.Linear(6,300), nn.ReLU(), nn.Linear(300,3)), loss_func=nn.CrossEntropyLoss(), cbs=cbs)
def run():
    learn = learner()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn
"""

def new_process(code, **env): return run_forked(training_code+code, **env)

print_norms = "\nprint(*(f'{v:.3g}' for v in run().grad_norm.norms), by_kernel.find_kernel() is not None)"

@pytest.fixture(scope='module')
def want():
    out,_ = new_process(print_norms)
    assert out.endswith('True\n')
    return out

@pytest.mark.parametrize('code,env,said', (("sys.modules['numba'] = None", {}, False),
                                           ("sys.modules['numba'] = type(sys)('numba')", {}, True),
                                           ("m = sys.modules['numba'] = type(sys)('numba')\ndef no(name): raise OSError(name)\nm.__getattr__ = no", {}, True),
                                           ("", dict(NUMBA_DISABLE_JIT='1'), False)), ids=('missing', 'broken', 'unloadable', 'off'))
def test_without(code, env, said, want):
    "Training goes on, with the same numbers; a numba that is there and cannot be used is worth a warning"
    out,err = new_process(code+print_norms, **env)
    assert out==want.replace('True', 'False') and ('numba is installed, but cannot be used' in err)==said

# What NUMBA_CACHE_LOCATOR_CLASSES would say, which numba 0.60 does not know
nowhere_to_cache = """
from numba.core.caching import CacheImpl
CacheImpl._locator_classes = []
"""

def test_nowhere_to_cache(want):
    "Compiled code that cannot be kept is compiled again"
    out,_ = new_process(nowhere_to_cache+print_norms+"\nprint(by_kernel.find_kernel().read.stats.cache_path)")
    assert out==want+'None\n'

@pytest.fixture(scope='module')
def filled_cache(want, tmp_path_factory):
    res = tmp_path_factory.mktemp('numba')
    assert new_process(print_norms, NUMBA_CACHE_DIR=str(res))[0]==want
    return res

@pytest.mark.parametrize('files,size', (('*.nbi', 0), ('*.nbc', 1000)), ids=('index','code'))
def test_damaged_cache(files, size, want, filled_cache, tmp_path):
    "As after a power cut: compiled anew, and said"
    shutil.copytree(filled_cache, tmp_path, dirs_exist_ok=True)
    found = list(tmp_path.rglob(files))
    for f in found: os.truncate(f, size)
    out,err = new_process(print_norms, NUMBA_CACHE_DIR=str(tmp_path))
    assert found and out==want and "numba's cache cannot be used" in err

def test_full_disk(want, tmp_path):
    out,err = new_process("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8192,8192))"+print_norms, NUMBA_CACHE_DIR=str(tmp_path))
    assert out==want and "numba's cache cannot be used" in err

def test_threads():
    "torch keeps its threads, and numba starts none"
    out,_ = new_process("""
import threading
torch.set_num_threads(2)
n = threading.active_count()
run()
import numba.np.ufunc.parallel as p
print(torch.get_num_threads(), threading.active_count()-n, p._is_initialized, by_kernel.find_kernel() is not None)""")
    assert out=='2 0 False True\n'

@pytest.mark.slow
def test_not_before_it_is_needed():
    "Neither the package nor a gradient elsewhere loads numba"
    out = run_command(sys.executable, '-c', training_code+"""
e = engine.Engine()
for dev in ('meta', 'cpu'):
    print('numba' in sys.modules)
    with torch.no_grad(): e.put(0, torch.empty(3, device=dev))
print('numba' in sys.modules)""", cwd=ROOT)
    assert out.split()==['False','False','True']

def test_interrupted_while_it_compiles():
    "The next fit compiles"
    assert new_process(nowhere_to_cache+"""
from numba.core.dispatcher import _FunctionCompiler
whole = _FunctionCompiler._compile_core
def stop(*args):
    _FunctionCompiler._compile_core = whole
    raise KeyboardInterrupt
_FunctionCompiler._compile_core = stop
learn = learner()
with learn.no_bar(), learn.no_logging():
    try: learn.fit(1)
    except KeyboardInterrupt: print('stopped')
    learn.fit(1)
print(len(learn.grad_norm.norms))""")[0]=='stopped\n5\n'

class Wrapped(torch.Tensor):
    "A tensor around another one, without memory of its own"
    @staticmethod
    def __new__(cls, t): return torch.Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype, device=t.device, requires_grad=t.requires_grad)
    def __init__(self, t): self.t = t
    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None):
        args,kwargs = tree_map(lambda o: o.t if isinstance(o, Wrapped) else o, (args,kwargs or {}))
        res = f(*args, **kwargs)
        return Wrapped(res) if isinstance(res, Tensor) and f._schema.name!='aten::copy_' else res

def test_no_memory_of_its_own():
    e,x = Engine(),torch.linspace(-3, 2, 99)
    assert Wrapped(x).data_ptr()==0
    with torch.no_grad():
        e.put(0, Wrapped(x))
        assert e.witness(Wrapped(x)).isfinite()
        e.put_all([1], [x], [Wrapped(x)])
    e.commit()
    s = e.fetch().sums
    assert s[:,MAX].tolist()==[3,3]
    np.testing.assert_allclose(s[1,[SUM_SQ,W_SQ,DOT]], [np.square(x.double().numpy()).sum()]*3, rtol=1e-6)

def test_weights_of_other_kinds():
    "Without memory, of another size (a parameter that was replaced before the step), of another dtype"
    e,x = Engine(),torch.linspace(-3, 2, 99)
    with torch.no_grad():
        with pytest.raises((ValueError,RuntimeError)): e.put_all([0], [torch.ones(200_000)], [torch.ones(100)])
        e.discard()
        e.put_all([0], [x], [nn.Parameter(torch._efficientzerotensor(99), requires_grad=False)])
        for k,dtype in enumerate((torch.float16, torch.bfloat16, torch.float64), 1): e.put_all([k], [x], [x.to(dtype)])
        e.put(4, torch._efficientzerotensor(10)[3:])
    e.commit()
    _,_,_,n,s,_ = e.fetch()
    assert s[:,MAX].tolist()==[3,3,3,3,0] and s[0,W_SQ]==0 and s[4,ZEROS]==7
    np.testing.assert_allclose(s[1:4,DOT], [(x.double()@x.to(d).double()).item() for d in (torch.float16,torch.bfloat16,torch.float64)], rtol=1e-6)

@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16))
@pytest.mark.parametrize('at', (0, BLOCK, 2*BLOCK+4))
def test_half_precision_in_pieces(at, dtype):
    x = torch.randn(2*BLOCK+5, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[at] = -99
    e = Engine()
    e.put(0, x)
    e.put_all([1], [x], [x])
    e.commit()
    _,_,_,n,s,_ = e.fetch()
    f,c = finish(s, n)
    for k in (0,1): np.testing.assert_allclose([*f[:,k], *c[1:,k]], [*measure(x).values()], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(s[1,[W_SQ,DOT]], s[1,SUM_SQ], rtol=1e-6)

def test_std_far_below_the_mean():
    "Also where the weights have another dtype"
    x = (torch.randn(1_500_000, dtype=torch.float64, generator=torch.Generator().manual_seed(9))*3e-7+.7).float()
    for w in (None, torch.ones(len(x)), torch.ones(len(x), dtype=torch.bfloat16)):
        e = Engine()
        e.put_all([0], [x], w if w is None else [w])
        e.commit()
        _,_,_,n,s,_ = e.fetch()
        np.testing.assert_allclose(finish(s, n)[0][4,0], x.double().std(unbiased=False).item(), rtol=1e-5)

@pytest.mark.parametrize('v', (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize('dtype', (torch.float32, torch.float64, torch.bfloat16))
def test_witness(v, dtype):
    "Finite or not, not the sum"
    e,x = Engine(),torch.full((3000,4), 3e38).to(dtype).t()
    assert math.isfinite(e.witness(x)) or dtype is torch.bfloat16   # whose sum is one of float32
    x[2,1999] = v
    assert not math.isfinite(e.witness(x)) and not math.isfinite(e.witness(x[:,1999:]))
