"Measure everything: `python -m benchmarks`, about a quarter of an hour on an idle machine, with `--quick` three"
import argparse,os,platform,time
from datetime import date
from fastai.basics import *
from . import counts, traffic
from .curves import curves
from .end_to_end import race
from .share import main as shares
from .writing import writing

def machine():
    "Where and with what this was measured"
    try: cpu = next(l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))
    except (OSError, StopIteration): cpu = platform.processor() or platform.machine()
    import fastai,numba,torchvision,fastai_gradstats
    return pd.DataFrame(dict(date=date.today().isoformat(), cpu=cpu, cores=os.cpu_count(), l3_mb=counts.l3()/2**20, load=round(os.getloadavg()[0], 1), system=platform.system(), python=platform.python_version(),
        torch=torch.__version__, torchvision=torchvision.__version__, numba=numba.__version__, fastai=fastai.__version__, fastai_gradstats=fastai_gradstats.__version__).items(), columns=['what','value'])

def tables(quick):
    "name -> title, function that measures it"
    vision = ['resnet18', *['resnet34']*(not quick), 'convnet', 'transformer-4']
    r = dict(rounds=1, steps=1, threads=(1,)) if quick else {}
    return dict(
        machine=('Machine', machine),
        share=('Share of a step in our events and hooks, one thread', lambda: shares(vision, **(dict(rounds=1, steps=1) if quick else dict(rounds=4, steps=3))).reset_index()),
        end_to_end=('Whole steps: ratio to the bare loop', lambda: pd.concat([race(o, **dict(steps=30 if o=='convnet' else 2)|r) for o in ['resnet18','convnet',*['transformer-6']*(not quick)]])),
        writing=('What `folder=` adds to both callbacks, one thread', lambda: pd.concat([writing(o, **(dict(rounds=1) if quick else {})) for o in ['resnet18','convnet','transformer-4']])),
        read_passes=('Read passes for all statistics of all parameter gradients', counts.read_passes),
        host_reads=('Host reads and operations per step, on a device', lambda: pd.concat([counts.host_reads(o) for o in ['convnet', *['resnet18']*(not quick)]])),
        gpu_traffic=('What both callbacks add to a step on a GPU, counted on one that is not there', lambda: traffic.gpu_traffic(traffic.small_cases if quick else traffic.cases)),
        gpu_host_time=('Microseconds of the host for what a kernel on a GPU reads, without the launch', traffic.host_time),
        kept=('Bytes kept per step', counts.kept),
        bounded=('Peak memory with `keep`', counts.bounded),
        curves=('How the cost grows', lambda: curves(quick)))

def text(v): return '' if v!=v else f'{v:.4g}' if isinstance(v, float) and abs(v)<1e5 else f'{v:.0f}' if isinstance(v, float) else str(v).replace('|', '\\|')
def markdown(d): return '\n'.join('| '+' | '.join(map(text, r))+' |' for r in [list(d), ['---']*len(d.columns), *d.itertuples(index=False)])

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--quick', action='store_true', help='one round, fewer models; nothing is written unless --out is given')
    p.add_argument('--out', help='folder for the tables (default: docs/benchmarks)')
    p.add_argument('--only', nargs='*', help=f"only these tables: {', '.join(tables(True))}")
    a = p.parse_args()
    out,pages = a.out or (None if a.quick else Path(__file__).parents[1]/'docs/benchmarks'),[]
    if out: Path(out).mkdir(parents=True, exist_ok=True)
    for n,(title,f) in tables(a.quick).items():
        if a.only and n not in a.only: continue
        t,d = time.time(),f()
        print(f'\n{title} ({time.time()-t:.0f} s)\n{d.round(3).to_string(index=False)}', flush=True)
        if out: d.to_csv(Path(out)/f'{n}.csv', index=False, float_format='%.5g')
    if not out: sys.exit()
    for n,(title,_) in tables(a.quick).items():
        if (f := Path(out)/f'{n}.csv').exists(): pages.append(f'## {title}\n\n{markdown(pd.read_csv(f))}\n')
    (Path(out)/'README.md').write_text('# Benchmarks\n\nWritten by `make bench`.\n\n'+'\n'.join(pages), encoding='utf-8')
