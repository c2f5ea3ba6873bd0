"""Build the site from the notebooks into _docs/, without Quarto. Exits 1 on any warning or broken link.

nbdev prepares the notebooks as for `nbdev-docs`, in _proc/; smalldocs renders that copy. Nothing in nbs/ changes, and
`nbdev-docs` still builds the same sources where Quarto is installed."""
import json,os,re,shutil,subprocess,sys,tarfile,tempfile,warnings
from functools import cache
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote,urlsplit

import yaml
from nbdev.config import get_config,nbpath2html
from nbdev.doclinks import _build_modidx
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parents[1]
PAGES = '.ipynb', '.qmd', '.md'

# --- stage: nbs/ -> _proc/, as nbdev does it, then what smalldocs needs otherwise

def staged(p):
    "The staged path of page `p`: `00_stats.ipynb` is served as `stats.html`."
    return nbpath2html(p).with_suffix(Path(p).suffix)

def stage(cfg):
    "Notebooks with show_doc run and doc links in place; any nbdev warning is an error."
    shutil.rmtree(ROOT/'_proc', ignore_errors=True)
    refresh_quarto_yml()
    _build_modidx()
    with warnings.catch_warnings():
        warnings.filterwarnings('error', module='nbdev')
        proc = proc_nbs(n_workers=0)
    for p in sorted(proc.rglob('*')):
        if p.suffix not in PAGES: continue
        text = relink(p.read_text(encoding='utf-8'), cfg)
        p.write_text(drop_directives(text) if p.suffix=='.ipynb' else text, encoding='utf-8')
        p.rename(proc/staged(p.relative_to(proc)))
    (proc/'_quarto.yml').write_text(yaml.safe_dump(config(cfg), sort_keys=False), encoding='utf-8')
    return proc

@cache
def public(mod):
    "Anchors of the names that module `mod` documents; nbdev links private ones too, which have none."
    try: return {n.lower() for n in import_module(f'fastai_gradstats.{mod}').__all__}
    except ImportError: return ()

def relink(text, cfg):
    "Links to our own site from its root, so that they work offline and get checked; to notebooks, at their staged names."
    text = text.replace(cfg.doc_url, '/')
    text = re.sub(r'\[(`[^`]+`)\]\(/(\w+)\.html#(\w+)[\w.]*\)', lambda m: m[0] if m[3] in public(m[2]) else m[1], text)
    text = re.sub(r'\[(`(run|params|module)`)\]\(https?:[^)]*\)', r'\1', text)   # words here; nbdev takes them for fastcore's and fastai's functions
    text = re.sub(r'\[!\[(Open In Colab)\]\([^)]*\)\]', r'[\1]', text)   # the badge is another host's picture
    text = re.sub(r'^( *"?)output-file: [^"\n\\]*', r'\1', text, flags=re.M)
    return re.sub(r'\]\((?!\w+:)([^)\s#]+\.(?:ipynb|qmd))', lambda m: f']({staged(m[1]).as_posix()}', text)

def drop_directives(text):
    "`#| export` marks the Markdown cell that becomes the module's docstring; nbdev leaves the line in."
    nb = json.loads(text)
    for c in nb['cells']:
        if c['cell_type']=='markdown': c['source'] = re.sub(r'^(#\|.*\n)+', '', ''.join(c['source']))
    return json.dumps(nb)

def config(cfg):
    "_quarto.yml and its metadata files as one, without what only Quarto reads, globs spelled out."
    res = {}
    for f in ('_quarto.yml', 'nbdev.yml', 'sidebar.yml'):
        for k,v in yaml.safe_load((cfg.nbs_path/f).read_text(encoding='utf-8')).items():
            res[k] = {**res.get(k, {}), **v} if isinstance(v, dict) else v
    for k in ('metadata-files', 'format-links'): res.pop(k, None)
    res['format'] = {'html': {k:v for k,v in res['format']['html'].items() if k!='keep-md'}}
    res['website']['llms-txt'] = True
    bar = res['website']['sidebar']
    bar['contents'] = expand(bar['contents'], cfg.nbs_path)
    return res

def expand(contents, nbs):
    "Sidebar entries with each `auto: GLOB` replaced by its pages; a section without a page is left out."
    res = []
    for c in contents:
        if isinstance(c, str): res.append(staged(c).as_posix())
        elif 'auto' in c: res += [staged(p.relative_to(nbs)).as_posix() for p in sorted(nbs.glob(c['auto'])) if p.name[0] not in '._']
        elif 'contents' in c:
            if kids := expand(c['contents'], nbs): res.append({**c, 'contents': kids})
        else: res.append({**c, 'href': staged(c['href']).as_posix()})
    return res

# --- search: what people type, and which pages come first

def ranks(contents, section=''):
    "Page -> 0 for a page of answers, 1 of reference, 2 of how the package is built, or of what was"
    order = {'Reference':1, 'How it is built':2}
    res = {}
    for c in contents:
        if isinstance(c, dict) and 'contents' in c: res |= ranks(c['contents'], c['section'])
        else:
            page = c if isinstance(c, str) else c['href']
            res[str(Path(page).with_suffix('.html'))] = 2 if page.startswith(('changelog','cite')) else order.get(section, 0)
    return res

def search_index(site, cfg):
    "Each entry of the index with its page's rank; what people type for a page (search.yml) goes to the first entry of it"
    rank = ranks(config(cfg)['website']['sidebar']['contents'])
    typed = yaml.safe_load((ROOT/'docs'/'search.yml').read_text(encoding='utf-8'))
    entries = json.loads((site/'search.json').read_text(encoding='utf-8'))
    for e in entries:
        page,_,anchor = e['href'].partition('#')
        e['rank'] = rank.get(page, 2)
        if not anchor: e['typed'] = typed.pop(page, [])
    (site/'search.json').write_text(json.dumps(entries, ensure_ascii=False), encoding='utf-8')
    shutil.copy(ROOT/'docs'/'search.js', site/'site_libs'/'fuse'/'fuse.min.js')
    return [f'docs/search.yml: no page {page}' for page in typed]

# --- finish: pages that work offline, Markdown copies where nbdev's docstrings say, no dead link

def local_katex(site):
    "Serve formulas from the site itself: KaTeX from npm, at the version smalldocs names."
    cdn = re.compile(r'https://cdn\.jsdelivr\.net/npm/katex@([\d.]+)/dist')
    pages = {p: m[1] for p in site.rglob('*.html') if (m := cdn.search(p.read_text(encoding='utf-8')))}
    if not pages: return
    npm,dest = shutil.which('npm'),site/'site_libs'/'katex'
    with tempfile.TemporaryDirectory() as tmp:
        res = npm and subprocess.run([npm, 'pack', '--silent', f'katex@{next(iter(pages.values()))}'], cwd=tmp, capture_output=True)
        if not res or res.returncode: return print('note: no npm, or it could not fetch katex: formulas load from a CDN', file=sys.stderr)
        with tarfile.open(next(Path(tmp).glob('*.tgz'))) as t: t.extractall(tmp, **({'filter': 'data'} if sys.version_info>=(3,12) else {}))
        dist = Path(tmp)/'package'/'dist'
        for f in [dist/'katex.min.css', dist/'katex.min.js', dist/'contrib'/'auto-render.min.js', *dist.glob('fonts/*.woff2')]:
            (d := dest/f.relative_to(dist)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(f, d)
    for p in pages:
        up = os.path.relpath(dest, p.parent).replace(os.sep, '/')
        p.write_text(cdn.sub(up, p.read_text(encoding='utf-8')), encoding='utf-8')

def markdown_copies(site):
    "`stats.llms.md` as `stats.html.md`, which is the address nbdev writes into each module's docstring; pictures in base64 are left out."
    for p in sorted(site.rglob('*.llms.md')): p.rename(p.with_name(p.name.replace('.llms.md', '.html.md')))
    for p in site.rglob('*.html.md'):
        text = p.read_text(encoding='utf-8').replace('.llms.md', '.html.md')
        p.write_text(re.sub(r'data:image/[\w+]+;base64,[\w+/=]+', 'picture', text), encoding='utf-8')

def entry(site, url, page):
    "A page's line in llms.txt: title, address, description"
    md = str(Path(page).with_suffix('.html.md'))
    title,desc = re.match(r'# (.*)\n+(.*)', (site/md).read_text(encoding='utf-8')).groups()
    return f'- [{title}]({url}{md})' + (f': {desc}' if desc and desc[0] not in '#<' else '')

def llms_txt(site, cfg):
    "llms.txt with every page, in the sidebar's order, under its sections and with its description"
    res = [f'# {cfg.title or cfg.lib_name}', f'> {cfg.description}', '## Pages']
    for c in config(cfg)['website']['sidebar']['contents']:
        if 'section' in c: res += [f"## {c['section']}", '\n'.join(entry(site, cfg.doc_url, p) for p in c['contents'])]
        else: res.append(entry(site, cfg.doc_url, c if isinstance(c, str) else c['href']))
    (site/'llms.txt').write_text('\n\n'.join(res)+'\n', encoding='utf-8')

class Links(HTMLParser):
    "The ids of a page and what it links to."
    def __init__(self, text):
        super().__init__()
        self.ids,self.hrefs = {'', 'top'},set()
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        for k,v in attrs:
            if k in ('id', 'name'): self.ids.add(v)
            elif k in ('href', 'src') and v: self.hrefs.add(v)

def dead_links(site):
    "Links to a file or an anchor that is not there."
    pages = {p.resolve(): Links(p.read_text(encoding='utf-8')) for p in site.rglob('*.html')}
    for p,page in pages.items():
        for href in sorted(page.hrefs):
            u = urlsplit(href)
            if u.scheme or u.netloc: continue
            to = (p.parent/unquote(u.path)).resolve() if u.path else p
            if to.is_dir(): to /= 'index.html'
            if not to.exists() or (to in pages and unquote(u.fragment) not in pages[to].ids):
                yield f'{p.relative_to(site.resolve())}: dead link {href}'

def main():
    if sys.version_info < (3,11): sys.exit('The docs need Python 3.11 or later: smalldocs does')
    from smalldocs.site import build
    os.chdir(ROOT)
    cfg = get_config()
    proc = stage(cfg)
    res = build(proc, quiet=True)
    site = cfg.doc_path
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(res.out, site)
    local_katex(site)
    markdown_copies(site)
    llms_txt(site, cfg)
    problems = [*res.warnings, *search_index(site, cfg), *dead_links(site)]
    for p in problems: print(f'warning: {p}', file=sys.stderr)
    print(f'{len(res.pages)} pages in {site.relative_to(ROOT)}/, {len(problems)} warnings')
    sys.exit(bool(problems))

if __name__=='__main__': main()
