"The tests have one place for each case and one definition of each helper. Where a new case goes: `tests/README.md`."
import ast,re
from collections import defaultdict

import pytest

from helpers.project import ROOT

FILES = {p.relative_to(ROOT/'tests').as_posix(): p.read_text(encoding='utf-8') for p in sorted((ROOT/'tests').rglob('*.py'))}
TREES = {f:ast.parse(text) for f,text in FILES.items()}

def imported(tree):
    "Modules that a file imports, anywhere in it"
    for o in ast.walk(tree):
        if isinstance(o, ast.Import): yield from (a.name for a in o.names)
        elif isinstance(o, ast.ImportFrom): yield o.module or ''

def defined(tree):
    "Names that a file defines at its top: functions, classes and variables"
    for o in tree.body:
        if isinstance(o, (ast.FunctionDef,ast.ClassDef)): yield o.name
        elif isinstance(o, (ast.Assign,ast.AugAssign,ast.AnnAssign)):
            for target in getattr(o, 'targets', None) or [o.target]:
                yield from (w.id for w in ast.walk(target) if isinstance(w, ast.Name))

@pytest.mark.parametrize('file', FILES)
def test_no_test_imports_a_test(file):
    "Nor `conftest`, which is pytest's: what several files need is in `tests/helpers`."
    others = [m for m in imported(TREES[file]) if m.split('.')[0]=='conftest' or m.split('.')[0].startswith('test_')]
    assert not others, f'move to tests/helpers what {file} takes from {others}'

def test_helpers_are_defined_once():
    "No two files define a helper of one name. Tests may share a name, since their file tells them apart."
    places = defaultdict(set)
    for file,tree in TREES.items():
        for name in defined(tree): places[name].add(file)
    twice = {n:sorted(files) for n,files in places.items() if len(files)>1 and not n.startswith('test_') and n!='pytestmark'}
    assert not twice, f'one definition in tests/helpers, or a name that says more: {twice}'

def test_every_file_has_its_place():
    "The table of `tests/README.md` names each test file and each module of helpers, and nothing that is not there."
    text = (ROOT/'tests'/'README.md').read_text(encoding='utf-8')
    named = set(re.findall(r'`((?:helpers/)?\w+\.py)`', text))
    assert named==set(FILES)-{'helpers/__init__.py'}
