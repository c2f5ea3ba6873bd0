"Run notebooks in place and save their outputs, without machine paths or progress bars, pictures in 256 colours: `execute.py [PATH...]`, default all."
import base64,os,re,sys,tempfile
from io import BytesIO
from pathlib import Path

import nbformat
from PIL import Image
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbglob

ROOT = Path(__file__).resolve().parents[1]
places = {str(p) for p in (*filter(None, sys.path), ROOT, sys.prefix, Path.home(), tempfile.gettempdir())}
paths = re.compile('|'.join(re.escape(p.rstrip('/')+'/') for p in sorted(places, key=len, reverse=True)))
bar = re.compile(r'<progress|progress-bar|^\s*<style>.*</style>\s*$', re.S)

def noise(o):
    "Is this output only a progress bar, its style sheet, or nothing?"
    if o.output_type=='stream': return not o.text.strip()
    if o.output_type!='display_data' or set(o.data) - {'text/html', 'text/plain'}: return False
    return not o.data.get('text/html', ' x').strip() or bool(bar.search(o.data.get('text/html', '')))

def small(png):
    "The picture in 256 colours, less than half its size; MAXCOVERAGE keeps the rare ones, such as those of letters"
    f = BytesIO()
    Image.open(BytesIO(base64.b64decode(png))).convert('RGB').quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(f, 'png', optimize=True)
    return base64.b64encode(f.getvalue()).decode()

def tidy(outputs):
    "Outputs without noise, neighbouring streams joined, paths cut, pictures small."
    res = []
    for o in outputs:
        if o.output_type=='stream':
            o.text = '\n'.join(l.split('\r')[-1] for l in paths.sub('', o.text).split('\n'))
            if res and res[-1].output_type=='stream' and res[-1].name==o.name:
                res[-1].text += o.text
                continue
        for k,v in o.get('data', {}).items():
            if k.startswith('text/'): o.data[k] = paths.sub('', v)
            if k=='image/png': o.data[k] = small(v)
        if not noise(o): res.append(o)
    return res

def execute(fn):
    "Run the notebook at `fn`, in its folder, as `nbdev-test` would."
    nb = nbformat.read(fn, as_version=4)
    skip = [c for c in nb.cells if re.search(r'^#\|\s*(eval:\s*false|notest)', c.source, re.M)]
    for c in skip: c.metadata.tags = ['skip']
    NotebookClient(nb, timeout=600, kernel_name='python3', skip_cells_with_tag='skip',
                   extra_arguments=['--log-level=ERROR'], resources={'metadata': {'path': str(fn.parent)}}).execute()
    for c in nb.cells:
        if c.cell_type=='code': c.outputs = tidy(c.outputs)
    nbformat.write(nb, fn)
    nbdev_clean(str(fn))

def main():
    os.environ.update(IN_TEST='1', OMP_NUM_THREADS='1')   # a closing `nbdev_export()` does nothing; unstable runs give the same numbers with any number of cores
    os.environ.pop('MPLBACKEND', None)
    os.chdir(ROOT)
    for fn in [Path(a).resolve() for a in sys.argv[1:]] or sorted(Path(f).resolve() for f in nbglob()):
        print(fn.relative_to(ROOT), flush=True)
        execute(fn)

if __name__=='__main__': main()
