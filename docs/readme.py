"Write README.md from nbs/index.ipynb, with its saved outputs; pictures go to docs/images/. Needs no Quarto."
import base64,re
from pathlib import Path
from textwrap import indent

from fastcore.nbio import read_nb
from nbdev.config import get_config,nbpath2html
from nbdev.doclinks import NbdevLookup

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT/'docs'/'images'
HIDE = {'hide', 'default_exp', 'export', 'exporti'}
ansi = re.compile(r'\x1b\[[0-9;]*[A-Za-z]')

def directives(src):
    "`#| key: value` lines of a cell as a dict, and the rest of its source."
    lines = src.splitlines()
    n = next((i for i,l in enumerate(lines) if not re.match(r'#\s*\|', l)), len(lines))
    pairs = (re.split(r'[:\s]+', l.split('|', 1)[1].strip(), maxsplit=1) for l in lines[:n])
    return {p[0]: (p+[''])[1] for p in pairs}, '\n'.join(lines[n:]).strip()

def absolute(cfg, md):
    "Relative links of the notebook as links to the site, names in backticks as links to their docs."
    def fix(m):
        href,_,frag = m[1].partition('#')
        if re.match(r'\w+:|$', href): return m[0]
        page = nbpath2html(href).as_posix() if href.endswith(('.ipynb', '.qmd', '.md')) else href
        return f']({cfg.doc_url}{page}{"#"+frag if frag else ""})'
    return NbdevLookup().linkify(re.sub(r'\]\(([^)\s]+)\)', fix, md))

def table(html):
    "fastai's epoch table as a Markdown table."
    rows = ['| '+' | '.join(re.findall('<t[hd][^>]*>(.*?)</t', r, re.S))+' |' for r in re.findall('<tr[^>]*>(.*?)</tr', html, re.S)]
    return '\n'.join([rows[0], re.sub(r'[^|]+', '---', rows[0]), *rows[1:]])

def output(o, name):
    "One saved output as Markdown: a picture as a file, Markdown as it is, all else as indented text."
    data = o.get('data', {})
    def text(s): return indent(ansi.sub('', ''.join(s)).rstrip(), '    ')
    if o.output_type=='stream': return text(o.text) if o.name=='stdout' else ''
    if 'image/png' in data:
        (IMAGES/f'{name}.png').write_bytes(base64.b64decode(''.join(data['image/png'])))
        return f'![{name.replace("readme-", "").replace("-", " ")}](docs/images/{name}.png)'
    html = ''.join(data.get('text/html', ''))
    if 'fastprogress' in html: return table(html)
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    return text(data.get('text/plain', ''))

def cell_md(cfg, cell):
    "A cell and its outputs as Markdown blocks."
    dirs,src = directives(cell.source)
    off = lambda k: dirs.get(k)=='false'
    if cell.cell_type=='markdown': return [] if 'hide' in dirs else [absolute(cfg, src)]
    if cell.cell_type!='code' or HIDE & dirs.keys() or off('include'): return []
    name = 'readme-' + (dirs.get('label') or cell.id).removeprefix('fig-')
    outs = [] if off('output') else [output(o, f'{name}-{i}' if i else name) for i,o in enumerate(cell.get('outputs', []))]
    return ([] if off('echo') or not src else [f'```python\n{src}\n```']) + outs

def main():
    cfg = get_config(ROOT)
    IMAGES.mkdir(exist_ok=True)
    for p in IMAGES.glob('readme-*'): p.unlink()
    blocks = [b for c in read_nb(ROOT/'nbs'/'index.ipynb').cells for b in cell_md(cfg, c)]
    note = '<!-- Generated from nbs/index.ipynb by `make readme`: edit the notebook -->'
    (ROOT/'README.md').write_text('\n\n'.join([note, *filter(str.strip, blocks)])+'\n', encoding='utf-8')

if __name__=='__main__': main()
