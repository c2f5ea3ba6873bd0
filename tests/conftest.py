"The tests' common ground: no display, one project root, copies of it, processes that start fast."
import multiprocessing,os
os.environ.setdefault('MPLBACKEND', 'Agg')

import subprocess
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]

multiprocessing.set_forkserver_preload(['fastai.callback.all', 'torch.distributed.fsdp', 'torch.distributed.tensor', 'pyarrow.parquet', 'fastai_gradstats.all', 'hypothesis'])   # tests with several processes import these once

def run(*args, **kw):
    "Run a command and return its output, which is also the failure message."
    res = subprocess.run([str(a) for a in args], capture_output=True, text=True, **kw)
    assert res.returncode==0, f"{' '.join(map(str, args))}\n{res.stdout}\n{res.stderr}"
    return res.stdout

def project_files():
    "What git tracks, and what is new and not ignored."
    files = run('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', cwd=ROOT).split('\0')
    return [f for f in files if f and (ROOT/f).is_file()]

def checkout(dest):
    "Copy the project, as `project_files` lists it, to `dest`."
    for f in project_files():
        (dest/f).parent.mkdir(parents=True, exist_ok=True)
        (dest/f).write_bytes((ROOT/f).read_bytes())
    return dest

@pytest.fixture(scope='session')
def root(): return ROOT

@pytest.fixture
def by_rows(request):
    from oracles import by
    with by(request.param) as res: yield res
