"""Share of a step: CPU time inside a callback's events and hooks over the rest of the same step, one thread

The clock runs from outside, in every event of the watched callbacks and in every function that was given to a module's or a tensor's hook; nested calls count once."""
import argparse
from contextlib import contextmanager
from functools import wraps
from time import thread_time
from fastai.basics import *
from fastai_gradstats import GradNormCallback, GradStatsCallback, callback, capture
from .models import learner
from .peers import ours, others

class Clock:
    "Adds up the time in the functions it wraps"
    def __init__(self): self.ours,self.inside,self.calls = 0.,False,0
    def wrap(self, f):
        @wraps(f)
        def timed(*args, **kwargs):
            if self.inside: return f(*args, **kwargs)
            self.inside,t = True,thread_time()
            try: return f(*args, **kwargs)
            finally:
                self.ours += thread_time()-t
                self.inside,self.calls = False,self.calls+1
        return timed

hooks = [(nn.Module, 'register_forward_hook'), (nn.Module, 'register_forward_pre_hook'), (nn.Module, 'register_full_backward_hook'), (nn.Module, 'register_backward_hook'),
         (Tensor, 'register_hook'), (Tensor, 'register_post_accumulate_grad_hook')]
events = [Callback, callback._GradCallback]   # ours has a `__call__` of its own
flushes = [*((c, '_flush') for c in (GradStatsCallback,GradNormCallback)), (callback._StepGuard, 'tell')]   # no events: after the last batch of an epoch, in the optimizer's step
part = {'TrainEvalCallback','Recorder','CastToTensor','ProgressCallback','NoValid'}   # part of the step itself

@contextmanager
def watch(clock, steps):
    "Time events and hooks, and append to `steps` the seconds of each step with the part of it that is ours"
    calls,one,old = [c.__call__ for c in events],Learner.one_batch,[getattr(*o) for o in hooks+flushes]
    hook_of_all = capture.register_module_forward_hook
    def timed(call):
        ours = clock.wrap(call)
        return lambda self, e: (call if type(self).__name__ in part else ours)(self, e)
    def one_batch(self, *args):
        ours,n,t = clock.ours,clock.calls,thread_time()
        one(self, *args)
        steps.append((thread_time()-t, clock.ours-ours, clock.calls-n))
    def register(f): return lambda self, g, *args, **kwargs: f(self, clock.wrap(g), *args, **kwargs)
    for c,call in zip(events, calls): c.__call__ = timed(call)
    Learner.one_batch = one_batch
    capture.register_module_forward_hook = lambda f: hook_of_all(clock.wrap(f))
    for (c,n),f in zip(hooks+flushes, old): setattr(c, n, (register if (c,n) in hooks else clock.wrap)(f))
    try: yield
    finally:
        for c,call in zip(events, calls): c.__call__ = call
        Learner.one_batch = one
        capture.register_module_forward_hook = hook_of_all
        for (c,n),f in zip(hooks+flushes, old): setattr(c, n, f)

configs = ours | {'ActivationStats': others['ActivationStats']}

def share(name, # a key of `models`
          rounds=3,
          steps=5, # of each configuration in a round (10 where one step in 10 is recorded)
          only=None # names of `configs`; None for all
         )->pd.DataFrame:
    "One fit of each configuration per round; medians and quartiles over rounds of the share in percent. `all` is with what runs at the start and the end of a fit"
    ls,rows = {},[]
    for c in only or configs:
        try: ls[c] = learner(name, 1 + (10 if 'every' in c else steps), configs[c]())
        except TypeError as e: print(f'{c}: left out, {e}')
    for _ in range(rounds):
        for c,l in ls.items():
            clock,ts = Clock(),[]
            with watch(clock, ts), l.no_bar(), l.no_logging(): l.fit(1)
            t,ours,calls = np.array(ts[1:]).mean(0)   # the first is to warm up
            rows.append((c, ours/(t-ours)*100, clock.ours/(t-ours)/len(ts)*100, (t-ours)*1000, calls))
    d = pd.DataFrame(rows, columns=['callbacks','share %','all %','step ms','calls']).groupby('callbacks', sort=False)
    q = d['share %'].quantile([.25,.75]).unstack()
    res = d.median()
    res.insert(1, 'q1', q[.25]), res.insert(2, 'q3', q[.75])
    return res.reset_index().assign(model=name).set_index('model')

def main(names, **kwargs):
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try: return pd.concat([share(o, **kwargs) for o in names])
    finally: torch.set_num_threads(n)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--quick', action='store_true', help='one round')
    p.add_argument('--all', action='store_true', help='resnet34 too')
    p.add_argument('--model', nargs='*', help='only these models')
    p.add_argument('--only', nargs='*', help=f"only these callbacks: {', '.join(map(repr, configs))}")
    a = p.parse_args()
    names = a.model or ['resnet18', *['resnet34']*a.all, 'convnet', 'transformer-4']
    print(main(names, rounds=1 if a.quick else 3, steps=2 if a.quick else 5, only=a.only).round(2).to_string())
