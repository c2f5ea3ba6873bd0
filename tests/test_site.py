"The built site opens in a browser without errors and asks no other host for anything."
import importlib.util,json,re,shutil,sys,threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler,ThreadingHTTPServer
import pytest
from helpers.project import checkout,run_command,visit_page

pytestmark = [pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec('smalldocs'), reason='smalldocs is not installed: pip install "fastai-gradstats[docs]"'),
    pytest.mark.skipif(not shutil.which('chromium'), reason='chromium is not installed')]

class Loads(HTMLParser):
    "What a page loads: `src` of anything, `href` of `<link>`."
    def __init__(self, text): super().__init__(); self.urls = []; self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.urls += [u for u in (a.get('src'), a.get('href') if tag=='link' and a.get('rel') not in ('canonical', 'alternate') else None) if u]

def foreign(text): return [u for u in Loads(text).urls if re.match(r'(https?:)?//', u) and not u.startswith('http://127.0.0.1')]

class Handler(SimpleHTTPRequestHandler):
    "Serves a folder and keeps the paths that were not there"
    def __init__(self, *args, missing, **kw): self.missing = missing; super().__init__(*args, **kw)
    def log_message(self, *args): pass
    def send_error(self, code, *args, **kw):
        self.missing.append(f'{code} {self.path}')
        super().send_error(code, *args, **kw)

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built in a copy of the project; its address, and what was asked for and is not there"
    dest,missing = checkout(tmp_path_factory.mktemp('site')),[]
    run_command(sys.executable, 'docs/build.py', cwd=dest)
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=dest/'_docs', missing=missing))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield dest/'_docs',f'http://127.0.0.1:{server.server_port}',missing
    server.shutdown()

def visit(url, profile):
    "The page's final DOM, and what it wrote to the console"
    res = visit_page(url, profile)
    assert res.returncode==0 and '</html>' in res.stdout, res.stderr
    return res.stdout,[l for l in res.stderr.splitlines() if 'CONSOLE' in l]

def test_detects(tmp_path):
    "An error in the console and a picture of another host are seen."
    page = tmp_path/'bad.html'
    page.write_text('<img src="https://example.invalid/a.png"><link href="//example.invalid/a.css" rel="stylesheet">'
                    '<a href="https://example.invalid">x</a><script>nothing()</script>')
    dom,log = visit(page.as_uri(), tmp_path/'profile')
    assert any('nothing is not defined' in l for l in log)
    assert foreign(dom)==['https://example.invalid/a.png', '//example.invalid/a.css']

def test_pages(site, tmp_path):
    folder,url,missing = site
    pages,bad = sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*.html')),{}
    assert {'index.html', 'get_started.html', 'stats.html'} <= set(pages)
    formulas = 0
    for p in pages:
        (dom,log),static = visit(f'{url}/{p}', tmp_path/'profile'),(folder/p).read_text(encoding='utf-8')
        n = static.count('class="math')
        formulas += n
        problems = [*log, *foreign(static), *foreign(dom)]
        if dom.count('class="katex"') < n or 'katex-error' in dom: problems.append('a formula is not rendered')
        if problems: bad[p] = problems
    missing = [m for m in missing if m!='404 /favicon.ico']   # browsers ask for it unasked
    assert not bad and not missing and formulas, (bad, missing, formulas)

def test_names_link(site):
    "Public names in the pages' text lead to their documentation, classes and functions alike"
    folder,_,_ = site
    text = {p.relative_to(folder).as_posix(): p.read_text(encoding='utf-8') for p in folder.rglob('*.html')}
    documented = dict(GradStatsCallback='callback', GradNormCallback='callback', GradRecord='record', diagnose='diagnosis',
                      plot_grad_heatmap='plot', grad_along_ray='probe', save_report='report')
    for name,page in documented.items():
        assert f'id="{name.lower()}"' in text[f'{page}.html']
        plain = [p for p,t in text.items() if p!='changelog.html' and re.search(rf'<p>[^<]*<code>{name}</code>', t)]
        assert not plain, f'{name} is no link in {plain}'

def test_llms_txt(site):
    "It lists every page, with a description"
    folder,_,_ = site
    lines = [l for l in (folder/'llms.txt').read_text(encoding='utf-8').splitlines() if l.startswith('- ')]
    assert len(lines)==len(list(folder.rglob('*.html'))) and sum(': ' in l for l in lines)>=len(lines)-1
    for l in lines: assert (folder/re.search(r'\]\(https://[^/]*/[^/]*/(.*?)\)', l)[1]).exists(), l

typed = {   # what people type -> the page that comes first
    'pytorch loop':'howto/plain_loop', 'without fastai':'howto/plain_loop', 'hugging face':'howto/hugging_face', 'huggingface trainer':'howto/hugging_face',
    'hf':'howto/hugging_face', 'lightning':'howto/lightning', 'lightnig':'howto/lightning', 'nan':'howto/explodes', 'loss is nan':'howto/explodes',
    'explode':'howto/explodes', 'exploding gradients':'howto/explodes', 'which sample':'howto/explodes', 'skip step':'howto/explodes',
    'clip':'howto/max_norm', 'max_norm':'howto/max_norm', 'gradient clipping':'howto/max_norm', 'wandb':'howto/loggers', 'W&B':'howto/loggers',
    'tensorboard':'howto/loggers', 'resume':'howto/files', 'crash':'howto/files', 'gpu':'benchmarks', 'slow':'benchmarks', 'overhead':'benchmarks',
    'freeze':'tutorials/finetune_lr_find', 'fine-tune':'tutorials/finetune_lr_find', 'lr_find':'tutorials/finetune_lr_find',
    'fp16':'howto/amp_accumulation_clipping', 'amp':'howto/amp_accumulation_clipping', 'accumulation':'howto/amp_accumulation_clipping',
    'ddp':'howto/compile_gpus', 'compare two runs':'record', 'dead relu':'reading', 'which layer is dead':'reading', 'zero gradient':'reading', 'is my training healthy':'reading', 'which layer':'tutorials/depth',
    'wandb watch':'howto/coming_from', 'my callback':'tasks', 'GradStatsCallback':'callback', 'keep':'callback', 'update_every':'callback',
    'plot_grad_heatmap':'plot', 'GradAlert':'alert', 'save_report':'report', 'per_sample_norms':'probe'}

def design_notes(site):
    "Pages that the sidebar has under 'How it is built'"
    section = (site/'index.html').read_text(encoding='utf-8').split('How it is built')[1]
    return set(re.findall(r'href="(?:\./)?(\w+\.html)"', section.split('</ul>')[0]))

@pytest.fixture(scope='module')
def search(site, tmp_path_factory):
    "Addresses of what the site's own search finds, for each of these queries, and how long the slowest took in ms"
    folder,url,_ = site
    queries = [*typed, 'engine', 'zzzz', 'gradient', 'step']
    script = """<script src="site_libs/fuse/fuse.min.js"></script><script>
        fetch("search.json").then((r) => r.json()).then((index) => {
            const fuse = new window.Fuse(index), found = {};
            let slowest = 0;
            for (const q of QUERIES) {
                const start = performance.now();
                found[q] = fuse.search(q, {limit: 20}).map((hit) => hit.item.href);
                slowest = Math.max(slowest, performance.now() - start);
            }
            document.body.textContent = JSON.stringify([found, slowest]);
        });</script>"""
    (folder/'queries.html').write_text(f"<body>{script.replace('QUERIES', json.dumps(queries))}</body>", encoding='utf-8')
    try: dom,log = visit(f'{url}/queries.html', tmp_path_factory.mktemp('search')/'profile')
    finally: (folder/'queries.html').unlink()
    assert not log
    return json.loads(re.search(r'<body>(.*)</body>', dom, re.S)[1].replace('&amp;', '&'))

def test_search_finds_what_people_type(search):
    found,_ = search
    first = {q:found[q][0].partition('#')[0] if found[q] else None for q in typed}
    assert first=={q:f'{page}.html' for q,page in typed.items()}
    assert not found['zzzz'] and found['engine'][0].startswith('engine.html')

def test_search_ranks_answers_above_design_notes(site, search):
    "In words that stand on most pages, how the package is built comes after all answers; a page has three places at most"
    found,_ = search
    notes = design_notes(site[0])
    assert {'engine.html','capture.html','stores.html'}<=notes and 'callback.html' not in notes
    for q in ('gradient','step'):
        pages = [href.partition('#')[0] for href in found[q]]
        assert len(pages)==20 and not notes & set(pages[:10])
        assert max(map(pages.count, pages))<=3

def test_search_knows_its_pages(site):
    "Each page has a rank, and words that people type for it where it is one of answers"
    folder,_,_ = site
    tops = {e['href']:e for e in json.loads((folder/'search.json').read_text(encoding='utf-8')) if '#' not in e['href']}
    assert {e['rank'] for e in tops.values()}=={0,1,2}
    assert not [href for href,e in tops.items() if e['rank']==0 and not e['typed']]

def test_pages_for_language_models(site):
    "No picture stands in them as text"
    folder,_,_ = site
    pages = {p:p.read_text(encoding='utf-8') for p in folder.rglob('*.html.md')}
    assert len(pages)>40 and not [p.name for p,text in pages.items() if ';base64,' in text]
    assert max(map(len, pages.values()))<60_000
