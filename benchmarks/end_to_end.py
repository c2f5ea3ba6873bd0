"Whole steps: each callback and each peer against the bare loop, interleaved, as ratios within a round"
from time import perf_counter, process_time
from fastai.basics import *
from .models import learner
from .peers import ours, others, close

class Stopwatch(Callback):
    "CPU time of the process (all its threads) and wall time of each batch"
    order = -1000
    def before_batch(self): self.t.append((process_time(), perf_counter()))
    def before_fit(self): self.t = []
    def after_train(self): self.before_batch()
    def per_step(self): return np.diff(np.array(self.t), axis=0)[1:].mean(0)   # without the first

def race(name, # a key of `models`
         threads=(1,2),
         rounds=9,
         limit=150, # seconds per number of threads, after which no new round starts
         steps=2, # that are measured in each fit; one more comes before them
         cbs=None # name -> function that makes the callbacks
        )->pd.DataFrame:
    "Ratios to the bare loop of the same round: median and quartiles. 'bare, again' shows the noise"
    cbs = {'bare': list, 'bare, again': list, **(cbs or {k:f for k,f in (ours|others).items() if 'every' not in k})}
    ls,fail,times = {},{},{}
    def run(c):
        sw = Stopwatch()
        with ls[c].no_bar(), ls[c].no_logging(): ls[c].fit(1, cbs=sw)
        return sw.per_step()
    before = torch.get_num_threads()
    for c,f in cbs.items():
        try: ls[c] = learner(name, steps+1, f())
        except Exception as e: fail[c] = f'{type(e).__name__}: {e}'
    for n in threads:
        torch.set_num_threads(n)
        start = perf_counter()
        for r in range(rounds):
            if r and perf_counter()-start>limit: break
            for c in np.roll(list(ls), r):
                if c in fail: continue
                try: times[c,n,r] = run(c)
                except Exception as e: fail[c] = ' '.join(f'{type(e).__name__}: {e}'.split())
    torch.set_num_threads(before)
    for l in ls.values(): close(l)
    return table(name, cbs, threads, times, fail)

def table(name, cbs, threads, times, fail):
    "A row per callback and number of threads"
    rows = []
    for n in threads:
        rounds = max(r for _,m,r in times if m==n)+1
        for c in cbs:
            row = dict(model=name, threads=n, callbacks=c)
            if c in fail: rows.append(row | dict(note=fail[c])); continue
            cpu,wall = np.array([times[c,n,r]/times['bare',n,r] for r in range(rounds)]).T
            for k,v in (('cpu',cpu), ('wall',wall)): row |= dict(zip((k, f'{k} q1', f'{k} q3'), np.quantile(v, [.5,.25,.75])))
            rows.append(row | {'step ms': np.median([times[c,n,r][1] for r in range(rounds)])*1000, 'rounds': rounds, 'note': ''})
    return pd.DataFrame(rows)
