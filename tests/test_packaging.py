"What gets installed is what settings.ini says, and the built archives are fit for PyPI."
import re,sys,tarfile,venv,zipfile
from configparser import ConfigParser
from importlib import metadata
import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from helpers.project import PKG,checkout,run_command

NAME = 'fastai-gradstats'

@pytest.fixture(scope='module')
def settings(root):
    cfg = ConfigParser()
    cfg.read(root/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

@pytest.fixture(scope='module')
def dist(root, tmp_path_factory):
    "sdist and wheel, built from a copy of the project."
    src,out = checkout(tmp_path_factory.mktemp('src')),tmp_path_factory.mktemp('dist')
    run_command(sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, src)
    return out

@pytest.fixture(scope='module')
def wheel(dist): return next(dist.glob('*.whl'))

def test_requirements(settings):
    "The installed metadata names settings.ini's requirements, extra by extra, and nothing else."
    want = {('', Requirement(r)) for r in settings['requirements'].split()}
    for k,v in settings.items():
        if k.endswith('_requirements'): want |= {(k[:-len('_requirements')], Requirement(r)) for r in v.split()}
    def plain(extra, r): return extra, r.name, str(r.specifier)
    def extra(r): return m[1] if (m := re.search(r'extra == "(\w+)"', str(r.marker))) else ''
    got = [Requirement(r) for r in metadata.requires(NAME)]
    assert {plain(extra(r), r) for r in got} == {plain(*o) for o in want}

def test_oldest_stack(root, settings):
    "What `make test-oldest` installs is each lower bound of settings.ini, and every package of a user has one."
    lines = (root/'tests/oldest.txt').read_text(encoding='utf-8').splitlines()
    pins = [Requirement(l) for l in lines if l and not l.startswith('#')]
    tested = {r.name:r.specifier for r in pins}
    of_users = 'requirements','parquet_requirements','cpu_requirements','alerts_requirements'
    for r in [Requirement(r) for name in of_users for r in settings[name].split()]:
        bound, = r.specifier
        assert bound.operator=='>=', r
        pin, = tested[r.name]
        assert pin.operator=='==' and Version(pin.version)==Version(bound.version), r.name

def test_metadata(root, settings):
    meta = metadata.metadata(NAME)
    assert settings['lib_name'] == meta['Name'] == NAME
    assert meta['Requires-Python'] == '>='+settings['min_python']
    assert meta['License-Expression'] == 'Apache-2.0'
    version = re.search(r'__version__ = "(.+?)"', (root/PKG/'__init__.py').read_text())[1]
    assert meta['Version'] == version
    assert f'version: {version}\n' in (root/'CITATION.cff').read_text()
    assert f'## {version}' in (root/'CHANGELOG.md').read_text()

def test_python_versions(root, settings):
    "The classifiers, CI's matrix and min_python name the same Pythons."
    vers = [c.split()[-1] for c in metadata.metadata(NAME).get_all('Classifier') if re.search(r':: 3\.\d+$', c)]
    matrix = re.search(r'python: \[(.*)\]', (root/'.github/workflows/test.yaml').read_text())[1]
    assert vers == re.findall(r'3\.\d+', matrix)
    assert vers[0] == settings['min_python']

def test_installed_from_here(root):
    "The tests run against this checkout."
    assert metadata.distribution(NAME).read_text('direct_url.json') is None or \
        root.as_uri() in metadata.distribution(NAME).read_text('direct_url.json')

def test_pictures():
    "PyPI shows pictures only by absolute address."
    assert not re.search(r'!\[[^]]*\]\((?!https://)', metadata.metadata(NAME).get_payload())

@pytest.mark.slow
def test_twine(dist): run_command(sys.executable, '-m', 'twine', 'check', '--strict', *dist.iterdir())

def test_sdist(dist):
    with tarfile.open(next(dist.glob('*.tar.gz'))) as t: names = {n.split('/', 1)[1] for n in t.getnames() if '/' in n}
    assert {'settings.ini', 'setup.py', 'pyproject.toml', 'LICENSE', 'README.md', 'CHANGELOG.md', f'{PKG}/__init__.py'} <= names
    assert not [n for n in names if n.startswith(('tests', 'nbs', 'docs', '.'))]

def test_wheel(root, wheel):
    "The wheel holds every module of the package and nothing else."
    names = set(zipfile.ZipFile(wheel).namelist())
    mods = {p.relative_to(root).as_posix() for p in (root/PKG).rglob('*.py')}
    assert {n for n in names if '.dist-info/' not in n} == mods

@pytest.mark.slow
def test_wheel_runs_elsewhere(wheel, tmp_path):
    "The wheel in another venv, which borrows only this one's dependencies, runs the main job."
    venv.create(tmp_path/'venv', with_pip=False)
    py = tmp_path/'venv'/('Scripts' if sys.platform=='win32' else 'bin')/'python'
    run_command(sys.executable, '-m', 'pip', '--python', py, 'install', '-q', '--no-deps', '--no-index', wheel)
    site = run_command(py, '-c', "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # A path line only: this venv's own .pth files (the editable install) are not processed
    with open(f'{site}/borrowed.pth', 'w') as f: f.write(str(metadata.distribution('torch').locate_file('')))
    where = run_command(py, '-c', f'import {PKG}; print({PKG}.__file__)', cwd=tmp_path)
    assert str(tmp_path) in where
    out = tmp_path/'out'
    run_command(py, '-m', PKG, '--epochs', '1', '--out', out, cwd=tmp_path)
    assert {'.png', '.csv'} <= {p.suffix for p in out.rglob('*')}
