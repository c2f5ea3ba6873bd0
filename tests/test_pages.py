"Pages name tests that exist."
import json,re

import pytest

from conftest import ROOT

PAGE = 'nbs/when_right.ipynb'
def text(nb): return '\n'.join(''.join(c['source']) for c in json.loads((ROOT/nb).read_text(encoding='utf-8'))['cells'] if c['cell_type']=='markdown')
def named(s): return re.findall(r'(tests/\w+\.py)::(\w+)', s)

def rows():
    "Rows of the page's tables, without their headers"
    lines = text(PAGE).splitlines()
    return [l for l,after in zip(lines, lines[1:]+['']) if l.startswith('|') and not re.fullmatch(r'[|:\- ]+', l) and not re.fullmatch(r'[|:\- ]+', after or 'x')]

def test_every_row_names_a_test():
    assert len(rows())>=20
    for r in rows():
        assert r.count('|')==4, f'three columns: {r}'
        assert named(r.split('|')[3]), f'no test is named: {r}'

@pytest.mark.parametrize('file,name', sorted(set(named(text(PAGE)))))
def test_named_test_exists(file, name):
    assert re.search(rf'^def {name}\(', (ROOT/file).read_text(encoding='utf-8'), re.M), f'{PAGE} names {file}::{name}'
