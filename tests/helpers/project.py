"The project's files, and commands that are run on them."
import contextlib,io,json,multiprocessing,os,subprocess,warnings
from pathlib import Path

PKG = 'fastai_gradstats'
ROOT = Path(__file__).resolve().parents[2]

def run_command(*args, **kw):
    "Run a command and return its output, which is also the failure message."
    res = subprocess.run([str(a) for a in args], capture_output=True, text=True, **kw)
    assert res.returncode==0, f"{' '.join(map(str, args))}\n{res.stdout}\n{res.stderr}"
    return res.stdout

def send_printed(code, env, connection):
    "Run code, and send what it prints"
    os.environ.update(env)
    os.chdir(ROOT)
    warnings.simplefilter('always')
    out,err = io.StringIO(),io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): exec(code, {'__name__':'__main__'})
    connection.send((out.getvalue(),err.getvalue()))

def run_forked(code, **env):
    "What a process prints that has imported fastai (`conftest.py`), but not numba: a new one takes longer to import than to do what it is asked"
    context = multiprocessing.get_context('forkserver')
    ours,theirs = context.Pipe(duplex=False)
    process = context.Process(target=send_printed, args=(code, env, theirs))
    process.start()
    theirs.close()
    try: res = ours.recv()
    except EOFError: res = None   # its traceback is in pytest's captured output
    process.join()
    assert process.exitcode==0, process.exitcode
    return res

def project_files():
    "What git tracks, and what is new and not ignored."
    files = run_command('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', cwd=ROOT).split('\0')
    return [f for f in files if f and (ROOT/f).is_file()]

def checkout(dest):
    "Copy the project, as `project_files` lists it, to `dest`."
    for f in project_files():
        (dest/f).parent.mkdir(parents=True, exist_ok=True)
        (dest/f).write_bytes((ROOT/f).read_bytes())
    return dest

def notebook_cells(nb): return json.loads((ROOT/nb).read_text(encoding='utf-8'))['cells']

def visit_page(page, folder):
    "Chromium, without a window, on a page (a file or an address), with its profile in `folder`: what it prints is the final DOM"
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
        --disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=3000 --dump-dom""".split()
    url = page.as_uri() if isinstance(page, Path) else page
    return subprocess.run(['chromium', *flags, f'--user-data-dir={folder}/profile', url], capture_output=True, text=True, timeout=120)
