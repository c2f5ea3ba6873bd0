"The project's files, and commands that are run on them."
import json,subprocess
from pathlib import Path

PKG = 'fastai_gradstats'
ROOT = Path(__file__).resolve().parents[2]

def run_command(*args, **kw):
    "Run a command and return its output, which is also the failure message."
    res = subprocess.run([str(a) for a in args], capture_output=True, text=True, **kw)
    assert res.returncode==0, f"{' '.join(map(str, args))}\n{res.stdout}\n{res.stderr}"
    return res.stdout

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
