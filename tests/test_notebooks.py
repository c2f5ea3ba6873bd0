"Every notebook runs, in this process, as `nbdev-test` runs it; those that take long, and their slow cells, with the slow tests."
import io,signal,sys
import matplotlib.pyplot as plt
import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_nb
from helpers.project import ROOT

RUN_NBS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(ROOT).parts))

# page -> what it is about, without which it is skipped; all of it is in the extra `dev`
NEEDS = {
    '00a_kernel.ipynb': ('numba',),
    '00b_kernel_gpu.ipynb': ('triton',),
    '01g_gpu_launch.ipynb': ('triton',),
    '01h_by_gpu_kernel.ipynb': ('triton',),
    'howto/hugging_face.ipynb': ('transformers','accelerate'),
    'howto/lightning.ipynb': ('lightning',)}
def page_name(nb): return nb.relative_to(ROOT/'nbs').as_posix()

def files_around():
    "The files a notebook could leave behind: in nbs/, where it runs, and beside it."
    return {p for d in (ROOT.glob('*'), (ROOT/'nbs').rglob('*')) for p in d if not {'__pycache__', '.pytest_cache', '.hypothesis'} & set(p.parts)}

def has_slow_cells(nb): return '"#| slow' in nb.read_text(encoding='utf-8')

# Pages that take eight seconds and more
LONG = {'01h_by_gpu_kernel.ipynb', '05_plot.ipynb', '07_report.ipynb', 'index.ipynb', 'gallery.ipynb', 'howto/compile_gpus.ipynb', 'howto/exporting.ipynb', 'howto/files.ipynb',
        'howto/hugging_face.ipynb', 'howto/watch.ipynb', 'tutorials/01_less_than_one.ipynb', 'tutorials/04_edges.ipynb', 'tutorials/06_finetune_lr_find.ipynb'}
def page(nb): return pytest.param(nb, marks=pytest.mark.slow) if page_name(nb) in LONG else nb

@pytest.mark.parametrize('nb', map(page, RUN_NBS), ids=map(page_name, RUN_NBS))
def test_notebook(nb, monkeypatch): check_notebook(nb, monkeypatch, skip_flags=get_config(ROOT).tst_flags.split())

@pytest.mark.slow
@pytest.mark.parametrize('nb', filter(has_slow_cells, RUN_NBS), ids=page_name)
def test_notebook_with_slow_cells(nb, monkeypatch): check_notebook(nb, monkeypatch, skip_flags=['notest'])

def check_notebook(nb, monkeypatch, skip_flags):
    for package in NEEDS.get(page_name(nb), ()): pytest.importorskip(package, reason=f'{page_name(nb)} is about {package}, which is not installed')
    before,err,sigint = files_around(),io.StringIO(),signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, '__stderr__', err)  # where nbdev writes the traceback of a failing cell
    monkeypatch.syspath_prepend(ROOT)
    try:
        with plt.rc_context(): ok,_ = run_nb(nb, skip_flags=skip_flags)   # pages set the size of their pictures
    finally:
        signal.signal(signal.SIGINT, sigint)     # nbdev's handler would end pytest without a report
        plt.close('all')
    if not ok: pytest.fail(err.getvalue(), pytrace=False)
    stray = files_around() - before
    assert not stray, f'{nb.name} left files behind: {sorted(map(str, stray))}'

def test_names_are_of_pages(): assert set(NEEDS)|LONG <= set(map(page_name, RUN_NBS))
