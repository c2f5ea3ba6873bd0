"""What only a GPU shows: `make bench-gpu`, in at most four minutes

First the checks: numbers, the same bits again, no wait for the device, other streams, a captured graph, AMP with an overflow, a second device.
Then the tables: what a step costs with the callbacks, by kernels and without; bandwidth; time of the host. Checks and tables run in processes of their own,
since an access outside of memory is the end of a process, and a process that takes too long is ended. What was found until then is written."""
import argparse, os, platform, subprocess, sys, threading, time, warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from fastai.basics import *
from fastai.callback.fp16 import MixedPrecision
from fastai.learner import TrainEvalCallback
from unittest import mock
from fastai_gradstats import GradNormCallback, GradStatsCallback, by_gpu_kernel
from fastai_gradstats.by_gpu_kernel import SWITCH, GpuBuffer, hard_tensors, prepare_kernels
from fastai_gradstats.engine import Engine
from fastai_gradstats.gpu_launch import DTYPES
from fastai_gradstats.stats import MAX, finish, measure
from .__main__ import markdown
from .models import GPT, NoValid, images, texts
from .peers import both, close, others, reader_of
from .traffic import microseconds

def small_net():
    "Its training is the same bit for bit on a GPU, too"
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10))

def resnet(name, bs, side):
    import torchvision
    return getattr(torchvision.models, name)(),images(bs, side)

cases = {  # name -> function that makes a model and its batch
    'resnet18, 32x3x64x64':   partial(resnet, 'resnet18', 32, 64),
    'resnet50, 32x3x224x224': partial(resnet, 'resnet50', 32, 224),
    'GPT of 36 million, 16x256': lambda: (GPT(8, 512, 10_000, 256), texts(10_000, 16, 256))}

@dataclass
class Setup:
    "Where, and how much"
    device: torch.device
    ends: float                       # when nothing new is begun any more,
    limit: float                      # and when all is over
    cases: dict = field(default_factory=lambda: cases)
    sizes: tuple = (1, 7, 2049, 100_003)  # of tensors with hard numbers,
    large: int = 5_000_011            # and of one more
    stream: int = 2**27               # elements whose reading is timed
    batches: int = 30                 # of a fit that is checked
    steps: tuple = (10, 50)           # fewest and most that are timed in a fit
    race: float = 20.                 # seconds at most that a race goes on after its first round
    def over(self): return time.time()>self.ends

# --- kernels, by themselves and in a fit

def kernels_of(device):
    kernels = prepare_kernels(device, list(DTYPES), with_octaves=True)
    if kernels is None: raise RuntimeError('there are no kernels; a warning above says why')
    if kernels.error is not None: raise kernels.error
    return kernels

def buffer_of(device, **kwargs): return GpuBuffer(device, kernels=kernels_of(device), **kwargs)

def rows_of(b):
    "All of them, if kernels have read them"
    assert not b.waiting and len(b.unmerged)==b.end, f'kernels have read {len(b.unmerged)} of {b.end}'
    _,numel,sums,_ = b.read(0, b.end)
    if b.kernels.error is not None: raise b.kernels.error
    return sums,numel

def read(tensors, device):
    b = buffer_of(device)
    for i,t in enumerate(tensors): b.put(i, t)
    return rows_of(b)

def learner(model, batch, cbs, device, steps):
    "What a step needs and no more: fastai's Recorder asks the device for the loss"
    batch = tuple(t.to(device) for t in batch)
    return Learner(DataLoaders([batch]*steps, [batch], device=device), model.to(device), loss_func=nn.CrossEntropyLoss(), default_cbs=False, cbs=[TrainEvalCallback(), NoValid(), *cbs])

def small_learner(setup, cbs):
    set_seed(0)
    return learner(small_net(), images(64, 4), cbs, setup.device, setup.batches)

def run(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

@contextmanager
def by_kernels(device):
    "Whatever is said of our callbacks or their kernels is an error"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        yield
    ours = [str(w.message) for w in said if 'record' in str(w.message) or 'kernels' in str(w.message)]
    if ours: raise RuntimeError('; '.join(ours))
    kernels_of(device)

# --- checks: each returns what it has to say, or None, and raises where something is wrong

@np.errstate(over='ignore')
def error(found, want, unit):
    "In parts of `unit`; 0 where both are beyond float32"
    if found==np.float32(want): return 0.
    return abs(float(found)-want)/max(unit, np.finfo(np.float32).tiny)

def right(setup):
    "Hard numbers and layouts in all dtypes, against the definitions"
    worst,n = 0.,0
    for dtype in DTYPES:
        tensors = [*hard_tensors(dtype, setup.device, setup.sizes), torch.randn(setup.large, device=setup.device).to(dtype)]
        sums,numel = read(tensors, setup.device)
        floats,counted = finish(sums, numel)
        for i,t in enumerate(tensors):
            want = measure(t.cpu())
            expected = [t.numel(), want['zeros'], want['nonfinite'], want['above']]
            assert counted[:,i].tolist()==expected, f'tensor {i} of {dtype}: {counted[:,i].tolist()} in place of {expected}'
            assert np.array_equal(floats[0,i], np.float32(want['max_abs']), equal_nan=True), f'tensor {i} of {dtype}: maximum {floats[0,i]} in place of {want["max_abs"]}'
            n += 1
            if want['nonfinite']: continue
            units = dict(mean_abs=want['mean_abs'], norm=want['norm'], mean=want['mean_abs'], std=max(want['std'], want['norm']/t.numel()**.5))
            for row,(name,unit) in enumerate(units.items(), 1): worst = max(worst, error(floats[row,i], want[name], unit))
    assert worst<1e-5, f'relative error {worst:.1e}'
    return f'{n} tensors, largest relative error {worst:.1e}'

def same_bits(setup):
    "Six times the same while another stream is busy, one by one and in a table"
    tensors = [torch.randn(n, device=setup.device) for n in (setup.large, 12_345, 3, setup.large//5)]
    other,results = torch.cuda.Stream(setup.device),[]
    for _ in range(6):
        with torch.cuda.stream(other):
            y = torch.randn(1000, 1000, device=setup.device)
            y = y@y
        b = buffer_of(setup.device)
        for i,t in enumerate(tensors): b.put(i, t)
        b.put_all(range(len(tensors)), tensors, tensors)
        results.append(rows_of(b)[0])
    assert all(np.array_equal(results[0], r) for r in results[1:])

def in_a_fit(setup):
    "The same weights as without callbacks, and norms as torch computes them from the same gradients"
    bare = small_learner(setup, [])
    run(bare)
    with by_kernels(setup.device):
        learn = small_learner(setup, [GradStatsCallback(extra=dict(by_torch=lambda g: g.double().norm())),GradNormCallback()])
        run(learn)
    for p,q in zip(bare.model.parameters(), learn.model.parameters()): assert torch.equal(p, q), 'other weights than without callbacks'
    df = learn.grad_stats.df
    assert len(df)==setup.batches*6, f'{len(df)} rows'
    np.testing.assert_allclose(df['norm'], df['by_torch'], rtol=1e-5)
    assert len(learn.grad_norm.norms)==setup.batches

class Strict(Callback):
    "From the second batch on torch raises where the host waits for the device, up to the end of the epoch, where ours may"
    order = -1000
    def before_batch(self):
        if self.iter==1: torch.cuda.set_sync_debug_mode('error')
    def after_train(self): torch.cuda.set_sync_debug_mode('default')

def no_wait(setup):
    "Both callbacks in a fit in which torch raises where the host waits; and that it would"
    class Waits(Callback):
        def after_loss(self): self.loss.item()
    try:
        with by_kernels(setup.device):
            learn = small_learner(setup, [*both(), Strict()])
            run(learn)
        assert len(learn.grad_norm.norms)==setup.batches and len(learn.grad_stats.df)==setup.batches*6
        try: run(small_learner(setup, [Waits(), Strict()]))
        except RuntimeError: return
    finally: torch.cuda.set_sync_debug_mode('default')
    raise AssertionError('torch did not raise where the host waited')

def host_is_back(setup):
    "Before the device, which sleeps, has begun"
    b,tensors = buffer_of(setup.device),[torch.randn(1000, device=setup.device) for _ in range(4)]
    b.put_all(range(4), tensors)   # builds its table
    torch.cuda.synchronize()
    torch.cuda._sleep(2*10**9)
    start = time.perf_counter()
    for i,t in enumerate(tensors): b.put(i, t)
    b.put_all(range(4), tensors)
    took = time.perf_counter()-start
    torch.cuda.synchronize()
    assert took<.5, f'{took:.2f} s'
    return f'after {took*1e3:.2f} ms'

def side_stream(setup):
    "A gradient that another stream computes is read there"
    b,stream = buffer_of(setup.device),torch.cuda.Stream(setup.device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        b.put(0, torch.full((setup.large,), 3., device=setup.device))
        b.merge()
    stream.synchronize()
    assert b.acc[0,MAX].item()==3

def captured(setup):
    "In a graph: each replay writes the row anew"
    x = torch.ones(10**5, device=setup.device)
    b = buffer_of(setup.device)
    b.put(0, x)
    b.merge()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.mul_(2)
        b.put(1, x)
        b.merge()
    graph.replay()
    graph.replay()
    assert b.acc[1,MAX].item()==x.max().item()

def overflow(setup):
    "A real GradScaler, whose first steps overflow"
    with by_kernels(setup.device):
        learn = small_learner(setup, [*both(), MixedPrecision(init_scale=2.**60, backoff_factor=2.**-20)])
        run(learn)
    df = learn.grad_norm.df
    assert df['skipped'].iloc[0] and not df['skipped'].iloc[-1], 'steps that were skipped: '+str(df['skipped'].sum())
    assert np.isfinite(df.loc[~df['skipped'],'norm']).all()
    outputs = learn.grad_stats.df.query('kind=="output" and not skipped')
    assert (outputs['max_abs']<1).all(), "AMP's scale is still in them"
    return f"{df['skipped'].sum()} of {len(df)} steps were skipped"

def second_device(setup):
    if torch.cuda.device_count()<2: return 'there is none'
    reads_there(torch.device('cuda', 1))

def reads_there(device):
    "Also where it is not the current one"
    b = buffer_of(device)
    x = torch.full((99,), 2., device=device)
    b.put(0, x)
    b.put_all([1], [x], [x])
    sums,_ = rows_of(b)
    assert (sums[:,MAX]==2).all()

checks = right,same_bits,in_a_fit,no_wait,host_is_back,side_stream,captured,overflow,second_device

def run_checks(setup, say)->bool:
    "Each of them, whatever becomes of the others; True where all were right"
    all_right = True
    for check in checks:
        if setup.over():
            say(f'- {check.__name__}: **skipped**, there was no time left')
            all_right = False
            continue
        start = time.time()
        try: said = check(setup) or 'ok'
        except Exception as e:
            said = f'**failed**, {type(e).__name__}: {" ".join(str(e).split())[:500]}'
            all_right = False
        say(f'- {check.__name__}: {said} ({time.time()-start:.1f} s)')
    return all_right

# --- what a step costs

kinds = {'bare': list, 'kernels': both, 'by rows': both, 'kernels, every=10': partial(both, every=10),
         **{name:others[name] for name in ('ActivationStats','wandb.watch','Lightning')}}
ours = 'kernels','by rows','kernels, every=10'

class Timed(Callback):
    "Milliseconds of a step, from the third on"
    order = 1000
    warm = 2
    def before_batch(self):
        if self.iter!=self.warm: return
        torch.cuda.synchronize()
        self.start = time.perf_counter()
    def after_batch(self):
        if self.iter!=self.n_iter-1: return
        torch.cuda.synchronize()
        self.ms = (time.perf_counter()-self.start)/(self.n_iter-self.warm)*1e3

def way(kind): return mock.patch.dict(os.environ, {SWITCH: '0' if kind=='by rows' else '1'})

def ms_a_step(learn, kind):
    timed = Timed()
    with way(kind), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=timed)
    return timed.ms

def with_precision(precision): return [MixedPrecision(amp_mode='bf16')] if precision=='bf16' else []

class NoTime(Exception): "For what would take longer than there is time"

def race(setup, make, precision, seconds)->pd.DataFrame:
    "Kinds take turns for so long, and once at least"
    def new(kind, steps):
        set_seed(0)
        return learner(*make(), [*with_precision(precision), *kinds[kind]()], setup.device, steps+Timed.warm)
    fewest,most = setup.steps
    ms = ms_a_step(new('bare', fewest), 'bare')
    steps = min(max(int(500/ms), fewest), most)
    needed = 2*2*len(kinds)*(steps+Timed.warm)*ms/1000   # two fits of each kind, and twice the time of a bare step
    if time.time()+needed>setup.limit: raise NoTime(f'{needed:.0f} s would be needed')
    learners,notes,times = {},{},{kind:[] for kind in kinds}
    for kind in kinds:
        try:
            with way(kind): learners[kind] = new(kind, steps)
            ms_a_step(learners[kind], kind)   # builds what is built once
        except Exception as e:
            learners.pop(kind, None)
            notes[kind] = f'{type(e).__name__}: {" ".join(str(e).split())[:200]}'
    ends = time.time()+min(seconds, setup.race)
    while not times['bare'] or time.time()<ends:
        for kind,learn in learners.items(): times[kind].append(ms_a_step(learn, kind))
    for kind,learn in learners.items():
        if kind in ours and used(learn)!=(kind!='by rows'): notes[kind] = 'not read in this way'
        close(learn)
    bare = np.median(times['bare'])
    rows = []
    for kind in kinds:
        found = dict(precision=precision, callbacks=kind)
        if times[kind]: found |= {'step ms': np.median(times[kind]), 'share %': (np.median(times[kind])/bare-1)*100, 'fits':len(times[kind]), 'steps':steps}
        rows.append(found | dict(note=notes.get(kind, '')))
    return pd.DataFrame(rows)

def used(learn)->bool:
    "Did kernels read, up to now?"
    buffers = reader_of(learn).engine.buffers.values()
    return all(isinstance(b, GpuBuffer) and b.kernels.error is None for b in buffers)

def bandwidth(setup)->pd.DataFrame:
    "GB a second of reading a large gradient once, in chunks of different sizes, and of a copy"
    rows = []
    for dtype in (torch.float32,torch.bfloat16):
        x = torch.randn(setup.stream, device=setup.device).to(dtype)
        y = torch.empty_like(x)
        gb = x.numel()*x.itemsize/1e9
        found = dict(dtype=str(dtype), copy=2*gb/seconds(lambda: y.copy_(x)), sum=gb/seconds(x.sum))
        b = buffer_of(setup.device)
        flags = b.flags_of(1)
        found['forward check'] = gb/seconds(lambda: flags.flag(x, 0, 0))
        for size in (2**11,2**12,2**13,2**14):
            with mock.patch.object(by_gpu_kernel, 'chunk_size', lambda n: size): found[f'read, {size}'] = gb/seconds(lambda: b.put(0, x), lambda: b.discard(0))
        rows.append(found)
        if b.kernels.error is not None: raise b.kernels.error
    return pd.DataFrame(rows)

def seconds(f, after=lambda: None, calls=10):
    "On the device, of a call"
    f()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls): f()
    torch.cuda.synchronize()
    took = time.perf_counter()-start
    after()
    return took/calls

def host_time(setup)->pd.DataFrame:
    "Microseconds of the host for an output, with the launch"
    engine = Engine()
    engine.prepare(setup.device, [torch.float32])
    x = torch.randn(1000, device=setup.device)
    def settle():
        engine.discard()
        torch.cuda.synchronize()
    rows = [dict(way='by kernels', us=microseconds(lambda: engine.put(0, x), settle, rounds=50))]
    flags = engine.buffer(setup.device).flags_of(1)
    if flags is not None: rows.append(dict(way='by kernels, forward check', us=microseconds(lambda: flags.flag(x, 0, 0), settle, rounds=50)))
    engine = Engine(by_rows=True)
    rows.append(dict(way='by rows', us=microseconds(lambda: engine.put(0, x), settle, rounds=50)))
    return pd.DataFrame(rows)

def run_tables(setup, say)->bool:
    "The small ones first; then a race for each model and precision, with what is left of the time"
    todo = [('Microseconds of the host for an output', host_time), ('GB a second', bandwidth)]
    races = [(f'{name}, {precision}', make, precision) for precision in precisions() for name,make in setup.cases.items()]
    for i,(title,make,precision) in enumerate(races):
        def one(setup, make=make, precision=precision, left=len(races)-i): return race(setup, make, precision, (setup.ends-time.time())/left/2)
        todo.append((f'A step of {title}', one))
    all_right = True
    for title,measured in todo:
        if setup.over():
            say(f'\n## {title}\n\n**Skipped**: there was no time left.')
            continue
        try:
            found = measured(setup)
            if 'note' in found: all_right &= not found[found['callbacks'].isin(ours)]['note'].any()
            said = markdown(found)
        except NoTime as e: said = f'**Skipped**: {e}.'
        except Exception as e:
            said = f'**Failed**: {type(e).__name__}: {" ".join(str(e).split())[:500]}'
            all_right = False
        say(f'\n## {title}\n\n{said}')
    return all_right

def precisions(): return ('fp32','bf16') if torch.cuda.is_bf16_supported(including_emulation=False) else ('fp32',)

# --- processes

parts = dict(checks=run_checks, tables=run_tables)
SECONDS = dict(checks=90, tables=140)   # within which a part is over; what is slow ends it early, and what hangs is ended
GRACE = 5                               # seconds more, for what was begun

def say(line): print(line, flush=True)

def run_part(name, device, seconds)->bool:
    "In a process of its own"
    start = time.time()
    return parts[name](Setup(device, start+.7*seconds, start+seconds), say)

def supervised(command, seconds, say)->bool:
    "Pass on what a process says; True where it ends well and in time"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding='utf-8', env=os.environ|{SWITCH:'1'})
    def listen():
        for line in process.stdout: say(line.rstrip('\n'))
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try: code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        say(f'\n**Ended** after {seconds} s.')
        return False
    listener.join(GRACE)
    if code not in (0,1): say(f'\n**Broken off**: exit code {code}.')
    return code==0

def head(device):
    import triton,fastai_gradstats
    free = ', '.join(f'{name} {version}' for name,version in (('torch',torch.__version__),('CUDA',torch.version.cuda),('triton',triton.__version__),('fastai-gradstats',fastai_gradstats.__version__)))
    return f'# On a GPU\n\n{torch.cuda.get_device_name(device)}, {free}, {platform.system()}, {date.today()}. Written by `make bench-gpu`.'

def main(out)->int: # exit code
    if not torch.cuda.is_available():
        print('There is no GPU here: nothing was measured.')
        return 0
    lines = []
    def note(line):
        say(line)
        lines.append(line)
        out.write_text('\n'.join(lines)+'\n', encoding='utf-8')   # whatever comes next
    note(head(torch.device('cuda', 0)))
    all_right = True
    for name,limit in SECONDS.items():
        note(f'\n## {name.capitalize()}\n' if name=='checks' else '')
        all_right &= supervised([sys.executable, '-m', 'benchmarks.gpu', '--part', name], limit+GRACE, note)
    note('\nAll checks were right.' if all_right else '\n**Not all was right.**')
    return 0 if all_right else 1

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--part', choices=parts, help='only this, in this process, to the screen')
    p.add_argument('--out', type=Path, default=Path(__file__).parents[1]/'docs/benchmarks/gpu.md')
    a = p.parse_args()
    if a.part: sys.exit(0 if run_part(a.part, torch.device('cuda', 0), SECONDS[a.part]) else 1)
    sys.exit(main(a.out))
