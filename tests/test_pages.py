"Pages name tests that exist."
import json,re
import pytest
from helpers.project import ROOT,notebook_cells

PAGE = 'nbs/when_right.ipynb'
def markdown_of(nb): return '\n'.join(''.join(c['source']) for c in json.loads((ROOT/nb).read_text(encoding='utf-8'))['cells'] if c['cell_type']=='markdown')
def named_tests(s): return re.findall(r'(tests/\w+\.py)::(?:<wbr>)?(\w+)', s)

def table_rows():
    "Rows of the page's tables, without their headers"
    lines = markdown_of(PAGE).splitlines()
    def is_rule(line): return re.fullmatch(r'[|:\- ]+', line)
    return [l for l,after in zip(lines, lines[1:]+['']) if l.startswith('|') and not is_rule(l) and not is_rule(after or 'x')]

def test_every_row_names_a_test():
    assert len(table_rows())>=20
    for r in table_rows():
        assert r.count('|')==4, f'three columns: {r}'
        assert named_tests(r.split('|')[3]), f'no test is named: {r}'

@pytest.mark.parametrize('file,name', sorted(set(named_tests(markdown_of(PAGE)))))
def test_named_test_exists(file, name):
    assert re.search(rf'^def {name}\(', (ROOT/file).read_text(encoding='utf-8'), re.M), f'{PAGE} names {file}::{name}'

TUTORIALS = 'nbs/tutorials/'
def numbers_printed(nb):
    "Numbers in the saved outputs"
    out = [''.join(o.get('text') or o['data'].get('text/plain', '')) for c in notebook_cells(nb) for o in c.get('outputs', [])]
    return [float(n) for n in re.findall(r'-?\d+\.?\d*(?:e[+-]?\d+)?', '\n'.join(out))]

def thread_answers():
    "Rows of the thread's table: (answer, pages named)"
    rs = [l.split('|')[2:4] for l in markdown_of(TUTORIALS+'01_less_than_one.ipynb').splitlines() if re.match(r'\| \*', l)]
    return [(a, re.findall(r'\((\w+\.ipynb)\)', w)+['01_less_than_one.ipynb']*('this page' in w)) for a,w in rs]

@pytest.mark.parametrize('answer,pages', thread_answers())
def test_answers_are_measured(answer, pages):
    "Each decimal number of an answer is printed on a page that the row names"
    have = [n for p in pages for n in numbers_printed(TUTORIALS+p)]
    said = re.findall(r'-?\d+\.\d+(?:e[+-]?\d+)?', answer)
    assert said and pages
    for s in said:
        digits = len(s.split('e')[0].split('.')[1])
        assert any(f'{n:.{digits}{"e" if "e" in s else "f"}}'==s for n in have), f'{s} is not printed in {pages}'
