"The tests' common ground: no display, processes that start fast, fixtures of several files. Helpers are in `tests/helpers`."
import multiprocessing,os,signal,sys
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('TRITON_INTERPRET', '1')   # kernels of a GPU run on the CPU; it has to be known before Triton is imported
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')   # as many processes as cores, one thread each

import inspect
import pytest

pytest.register_assert_rewrite('helpers')
from helpers.project import ROOT

# Tests with several processes import these once
multiprocessing.set_forkserver_preload(['fastai.callback.all', 'torch.distributed.fsdp', 'torch.distributed.tensor', 'pyarrow.parquet',
                                        'fastai_gradstats.all', 'hypothesis'])

@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector, name, obj):
    "A test is what its own file defines: `from fastai.basics import *` brings fastcore's `test_eq` and others"
    if inspect.isfunction(obj) and obj.__module__!=collector.module.__name__: return []

# What reads the project's files, and what may write some beside them while it runs: one at a time, also where tests run side by side
at_the_tree = 'test_notebooks','test_sync','test_packaging','test_site'
side_by_side = 'PYTEST_XDIST_WORKER' in os.environ

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if not side_by_side or item.path.stem not in at_the_tree: return (yield)
    import fcntl
    with open(ROOT/'pyproject.toml') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        return (yield)

# What takes longest comes first where tests run side by side (`pytest -n 2 --dist loadfile`), so that both processes end together
longest = 'test_notebooks','test_kernel','test_distributed','test_names','test_compile','test_engine','test_gpu_kernel','test_taking_part'

def pytest_collection_modifyitems(items):
    if not side_by_side: return
    place = {file:i for i,file in enumerate(longest)}
    items.sort(key=lambda item: place.get(item.path.stem, len(longest)))

@pytest.fixture(scope='session')
def root(): return ROOT

@pytest.fixture(scope='session', autouse=True)
def in_a_folder_apart(tmp_path_factory):
    "What tests write where they stand (`Learner.lr_find` makes a folder `models`) does not land in the project"
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp('cwd'))
    yield
    os.chdir(before)

@pytest.fixture(scope='session', autouse=True)
def interrupts_arrive():
    "Tests send Ctrl-C to themselves; a process that a shell starts with `&` would ignore it"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

@pytest.fixture(autouse=True)
def figures_closed():
    "No test sees the figures that another one drew"
    yield
    if 'matplotlib.pyplot' in sys.modules: sys.modules['matplotlib.pyplot'].close('all')

@pytest.fixture
def by_rows(request):
    "`Engine`'s argument, for a test that is marked `each_reader`"
    from helpers.callbacks import read_by   # it imports torch, which many a test does without
    with read_by(request.param) as res: yield res

@pytest.fixture
def fresh_dynamo():
    "Nothing compiled before the test, nor left behind"
    import torch._dynamo
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
