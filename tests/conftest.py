"The tests' common ground: no display, processes that start fast, fixtures of several files. Helpers are in `tests/helpers`."
import multiprocessing,os
os.environ.setdefault('MPLBACKEND', 'Agg')
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

# What reads the project's files, and what may write some beside them while it runs
at_the_tree = 'test_notebooks','test_sync','test_packaging','test_site'

def pytest_collection_modifyitems(items):
    "Side by side (`pytest -n 2 --dist loadgroup`) a file's tests stay together; the group that takes longest comes first"
    def group(item): return 'the tree' if item.path.stem in at_the_tree else item.path.stem
    if 'PYTEST_XDIST_WORKER' not in os.environ: return
    for item in items: item.add_marker(pytest.mark.xdist_group(group(item)))
    items.sort(key=lambda item: group(item)!='the tree')

@pytest.fixture(scope='session')
def root(): return ROOT

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
