"What can be counted: read passes, host reads, operations, bytes"
import gc,tracemalloc
from contextlib import ExitStack, contextmanager, nullcontext
from time import thread_time
from types import SimpleNamespace
from unittest import mock
from fastai.basics import *
from fastai.learner import TrainEvalCallback
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from fastai_gradstats import GradStatsCallback, capture
from fastai_gradstats.engine import Engine
from fastai_gradstats.stores import Rows, counts, floats
from fastai_gradstats.stats import statistics
from .models import NoValid, learner, models
from .peers import ours, others, close, reader_of

class Ops(TorchDispatchMode):
    "Counts aten operations, those of them that are work for the device (no view, no allocation), and those that bring something to the host"
    def __init__(self):
        super().__init__()
        self.on = True
        self.clear()
    def clear(self): self.ops,self.work,self.reads = 0,0,0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        r = f(*args, **(kwargs or {}))
        off = lambda o: isinstance(o, Tensor) and o.device.type!='cpu'
        host = lambda o: isinstance(o, Tensor) and o.device.type=='cpu'
        if not self.on or f.namespace!='aten': return r
        self.ops += 1
        self.work += not (f.is_view or 'empty' in f.name() or 'detach' in f.name())
        self.reads += any(map(off, args)) and (f is torch.ops.aten._local_scalar_dense.default or host(r)) or (f is torch.ops.aten.copy_.default and host(args[0]) and off(args[1]))
        return r

class LastStep(Callback):
    "Forgets what was counted before"
    order = -1000
    def __init__(self, ops): self.ops = ops
    def before_batch(self): self.ops.clear()

class NoBackward(Callback):
    "In place of a backward, which PyTorch cannot run on a GPU that is not there: gradients without values, and the hooks that wait for them"
    order = 1000   # behind what ours do before a backward
    def __init__(self, ops): self.ops,self.hooks = ops,[]
    def before_batch(self): self.hooks.clear()
    def before_backward(self):
        for p in self.model.parameters(): p.grad = torch.empty_like(p)
        self.ops.on = False
        todo = [(f, torch.empty_like(t)) for t,f in reversed(self.hooks)]
        self.ops.on = True
        for f,g in todo: f(g)
        raise CancelBackwardException('done')
    @contextmanager
    def catch(self):
        "Hooks on tensors wait for this backward, which trains, of a model that nobody but us looks at"
        def register(t, f):
            self.hooks.append((t,f))
            return SimpleNamespace(remove=noop)
        with ExitStack() as stack:
            for obj,name,new in ((Tensor, 'register_hook', register), (capture, '_of_torch_itself', lambda t: False), (capture._LossBackward, 'trains', lambda self: True)):
                stack.enter_context(mock.patch.object(obj, name, new))
            yield

def device_step(model, batch, cbs, device='cuda')->Ops:
    "The operations of a training step of a Learner on a device that has no numbers: 'cuda' (faked, by `FakeTensorMode`) or 'meta', where every look at a number raises"
    ops,fake = Ops(),device!='meta'
    nb = NoBackward(ops)
    with FakeTensorMode() if fake else nullcontext():
        with torch.device(device): m,b = model(),batch()
        m.to = lambda *args, **kwargs: m
        l = Learner(DataLoaders([b]*3, [b]), m, loss_func=nn.CrossEntropyLoss(), default_cbs=False, cbs=[TrainEvalCallback(), NoValid(), LastStep(ops), *cbs, *[nb]*fake])
        if reader_of(l): reader_of(l).flush = lambda: None   # at the end of the epoch it waits for the device, as it should
        with nb.catch() if fake else nullcontext(), ops: l.fit(1)
    return ops

def host_reads(name, cbs=None)->pd.DataFrame:
    "Per step on a device: host reads and operations that the callbacks add"
    rows = []
    bare = device_step(*models[name], [])
    for k,f in (cbs or {k:f for k,f in ours.items() if 'every' not in k and 'numba' not in k}).items():
        try: o,meta = device_step(*models[name], f()),device_step(*models[name], f(), 'meta')
        except TypeError as e: rows.append(dict(model=name, callbacks=k, note=str(e))); continue
        rows.append(dict(model=name, callbacks=k, reads=o.reads-bare.reads, reads_meta=meta.reads, work=o.work-bare.work, ops=o.ops-bare.ops, ops_bare=bare.ops))
    return pd.DataFrame(rows)

def l3():
    "Bytes of the largest cache; 32 MB where the system does not say"
    f = Path('/sys/devices/system/cpu/cpu0/cache/index3/size')
    return int(f.read_text().strip()[:-1])*1024 if f.exists() else 2**25

def naive(gs): return [[f(g, 1.).item() if k=='above' else f(g).item() for k,f in statistics.items()] for g in gs]

def reader(numba=True, full=True, **kwargs):
    "All statistics by the engine, of the same gradients again and again"
    e = Engine(**kwargs)
    if not numba: e.buffer(torch.device('cpu')).kernel = None
    def f(gs):
        m = e.mark()
        e.put_all(list(range(len(gs))), gs, full=full)
        e.discard(m)
    return f

def read_passes(name='resnet18', rounds=7)->pd.DataFrame:
    "CPU time for the statistics of all parameter gradients of a step, over that of one `torch.sum` of each, one thread, on more than twice the largest cache"
    model,(x,y) = (f() for f in models[name])
    F.cross_entropy(model(x), y).backward()
    gs = [p.grad for p in model.parameters()]
    size = sum(g.numel()*g.itemsize for g in gs)
    gs = [g.clone() for _ in range(-(-2*l3()//size)) for g in gs]
    fs = {'one torch.sum': lambda gs: [g.sum() for g in gs], 'engine': reader(), 'engine, no numba': reader(numba=False), 'engine, norms only': reader(full=False), 'device path on a CPU': reader(by_rows=True), 'naive, .item() each': naive}
    ts,before = {k:[] for k in fs},torch.get_num_threads()
    torch.set_num_threads(1)
    for r in range(rounds+1):
        for k,f in fs.items():
            t = thread_time()
            f(gs)
            if r: ts[k].append(thread_time()-t)
    torch.set_num_threads(before)
    one = np.array(ts['one torch.sum'])
    return pd.DataFrame([dict(model=name, what=k, tensors=len(gs), mb=sum(g.numel()*g.itemsize for g in gs)/1e6, **dict(zip(('passes','q1','q3'), np.quantile(v/one, [.5,.25,.75])))) for k,v in ts.items()])

def kept(name='convnet', steps=20)->pd.DataFrame:
    "Bytes of memory that stay in Python and numpy per step"
    rows = []
    for k,f in ({'bare': list} | {k:f for k,f in (ours|others).items() if 'every' not in k}).items():
        try: l = learner(name, steps, f())
        except Exception as e: rows.append(dict(model=name, callbacks=k, note=f'{type(e).__name__}: {e}')); continue
        with l.no_bar(), l.no_logging():
            l.fit(1)
            gc.collect()
            tracemalloc.start()
            l.fit(1)
            gc.collect()
            rows.append(dict(model=name, callbacks=k, bytes_per_step=tracemalloc.get_traced_memory()[0]/steps, tensors=sum(len(c.df) for c in l.cbs if isinstance(c, GradStatsCallback))/2/steps))
        tracemalloc.stop()
        close(l)
    return pd.DataFrame(rows)

def bounded(iterations=100_000, tensors=20, keep=1_000)->pd.DataFrame:
    "Peak memory of a record of `keep` iterations while iterations are added 200 at a time"
    n,rows,res = 200,Rows(floats, counts, keep=keep),[]
    keys = [rows.key(i, 'param', f'p{i}') for i in range(tensors)]
    rng,f = np.random.default_rng(0),lambda c: rng.random((len(c), n*tensors))
    tracemalloc.start()
    for i in range(0, iterations, n):
        where = np.zeros((5,n), int)
        where[3:] = np.arange(i, i+n)
        rows.append(where, np.full(n, tensors), np.tile(keys, n), f(floats).astype(np.float32), f(counts).astype(np.uint32))
        if (i+n)%(iterations//10)==0:
            res.append(dict(iterations=i+n, kept=len(rows), peak_mb=tracemalloc.get_traced_memory()[1]/1e6))
            tracemalloc.reset_peak()
    tracemalloc.stop()
    return pd.DataFrame(res)
