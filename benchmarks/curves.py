"How the cost grows with the number of tensors, of elements and of recorded steps, and with `every`"
from fastai.basics import *
from .counts import reader
from .models import learner
from .peers import both
from .share import Clock, thread_time, watch

def _read(sizes, rounds=5):
    "Milliseconds of CPU time for the statistics of tensors of these sizes, median"
    gs,f,ts = [torch.randn(n) for n in sizes],reader(),[]
    for _ in range(rounds+1):
        t = thread_time()
        f(gs)
        ts.append(thread_time()-t)
    return np.median(ts[1:])*1000

def tensors(total=2**20): return [('tensors', n, _read([total//n]*n), 'ms per read of 1M elements') for n in (1,4,16,64,256,1024)]
def elements(n=64): return [('elements', 2**k, _read([2**k//n]*n)*1e6/2**k, f'ns per element, in {n} tensors') for k in range(12, 26, 2)]

def _steps(name, n, cbs):
    "Seconds of each step, with the part that is ours"
    l,clock,ts = learner(name, n, cbs),Clock(),[]
    with watch(clock, ts), l.no_bar(), l.no_logging(): l.fit(1)
    return np.array(ts)

def recorded(n=2000, blocks=10):
    "Ours in a block of steps as the record grows; a tiny model has many steps"
    ts = _steps('linear', n, both())[:,1].reshape(blocks, -1)*1e6
    return [('recorded steps', (i+1)*n//blocks, t, 'µs per step') for i,t in enumerate(np.median(ts, axis=1))]

def every(name='convnet', ns=(1,2,5,10,20,50), steps=51):
    res = []
    for n in ns:
        t,ours,_ = _steps(name, steps, both(every=n))[1:].sum(0)
        res.append(('every', n, ours/(t-ours)*100, f'% of a step, {name}'))
    return res

def curves(quick=False)->pd.DataFrame:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try: return pd.DataFrame(tensors()+elements()+recorded(*[500]*quick)+every(steps=21 if quick else 51), columns=['curve','x','y','unit'])
    finally: torch.set_num_threads(before)
