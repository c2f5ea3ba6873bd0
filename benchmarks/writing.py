"What `folder=` adds: the time to write a part, over the steps that lie between two parts"
import os
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from fastai.basics import *
from fastai_gradstats.stores import Part
from fastai_gradstats.stream import Stream
from .end_to_end import Stopwatch
from .models import learner
from .peers import both

def clock(f):
    "CPU and wall time of a call"
    t = np.array([process_time(), perf_counter()])
    f()
    return np.array([process_time(), perf_counter()])-t

def sync(folder):
    "What is not done: ask the disk for each file"
    for p in Path(folder).glob('*.parquet'):
        with open(p, 'rb') as f: os.fsync(f.fileno())

def fill(stream, n):
    "Let about `n` iterations wait: those last recorded again and again, with noise, as equal numbers compress too well"
    rng = np.random.default_rng(0)
    def noisy(v): return (v*rng.uniform(.5, 2, np.shape(v))).astype(v.dtype) if v.dtype.kind=='f' else v
    for s in stream.stores.values():
        p = s.parts[-1]
        if isinstance(p, dict): s.sink += [{k:noisy(v) for k,v in p.items()} for _ in range(max(n//len(p['step']), 1))]
        else: s.sink += [Part(p.where, p.n, p.keys, noisy(p.floats), p.counts, hist=p.hist) for _ in range(max(n//len(p), 1))]

def writing(name, rounds=3, steps=3)->pd.DataFrame:
    "Medians over rounds, one thread; a round is a fit without files and then a part of each table, of as many iterations as come together in `Stream.seconds` or `Stream.every`"
    cbs,sw,rows,before = both(),Stopwatch(),[],torch.get_num_threads()
    l = learner(name, steps+1, cbs)
    torch.set_num_threads(1)
    for _ in range(rounds):
        with TemporaryDirectory() as d, l.no_bar(), l.no_logging():
            l.fit(1, cbs=sw)
            step = sw.per_step()
            n = int(np.clip(Stream.seconds/step[1], 1, Stream.every))
            streams = [Stream(c.record, d, c._consumer.tables) for c in cbs]
            t = []
            for i in (1,n):   # the first write claims the folder
                for s in streams: fill(s, i)
                t.append(sum(clock(s.write) for s in streams))
            rows.append((n, sum(f.stat().st_size for f in Path(d).glob('*.parquet')), *step*1000, *t[1]*1000, *t[1]/(n*step)*100, clock(partial(sync, d))[1]*1000))
    torch.set_num_threads(before)
    names = ['iterations a part','bytes','step cpu ms','step ms','write cpu ms','write ms','cpu %','wall %','fsync ms']
    return pd.DataFrame([dict(model=name, **pd.DataFrame(rows, columns=names).median())])
