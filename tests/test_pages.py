"Pages name tests that exist."
import json,re

import pytest

from conftest import ROOT

PAGE = 'nbs/when_right.ipynb'
def text(nb): return '\n'.join(''.join(c['source']) for c in json.loads((ROOT/nb).read_text(encoding='utf-8'))['cells'] if c['cell_type']=='markdown')
def named(s): return re.findall(r'(tests/\w+\.py)::(?:<wbr>)?(\w+)', s)

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

TUTORIALS = 'nbs/tutorials/'
def cells(nb): return json.loads((ROOT/nb).read_text(encoding='utf-8'))['cells']
def printed(nb):
    "Numbers in the saved outputs"
    out = [''.join(o.get('text') or o['data'].get('text/plain', '')) for c in cells(nb) for o in c.get('outputs', [])]
    return [float(n) for n in re.findall(r'-?\d+\.?\d*(?:e[+-]?\d+)?', '\n'.join(out))]

def answers():
    "Rows of the thread's table: (answer, pages named)"
    rs = [l.split('|')[2:4] for l in text(TUTORIALS+'01_less_than_one.ipynb').splitlines() if re.match(r'\| \*', l)]
    return [(a, re.findall(r'\((\w+\.ipynb)\)', w)+['01_less_than_one.ipynb']*('this page' in w)) for a,w in rs]

@pytest.mark.parametrize('answer,pages', answers())
def test_answers_are_measured(answer, pages):
    "Each decimal number of an answer is printed on a page that the row names"
    have = [n for p in pages for n in printed(TUTORIALS+p)]
    said = re.findall(r'-?\d+\.\d+(?:e[+-]?\d+)?', answer)
    assert said and pages
    for s in said:
        digits = len(s.split('e')[0].split('.')[1])
        assert any(f'{n:.{digits}{"e" if "e" in s else "f"}}'==s for n in have), f'{s} is not printed in {pages}'
