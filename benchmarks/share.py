"""Share of a step: CPU time inside a callback's events and hooks over the rest of the same step, one thread

The clock runs from outside: in every event of the watched callbacks, in every function that was given to a module's or a tensor's hook,
and in what else calls us (the optimizer's step, the end of an epoch). Nested calls count once, and what we call that is none of ours
(the step itself) does not count."""
import argparse
from contextlib import ExitStack, contextmanager
from time import thread_time
from unittest import mock
from fastai.basics import *
from fastai_gradstats import GradAlert, callback, capture
from fastai_gradstats.recorder import Reader
from fastai_gradstats.watch import MethodWatch, StepWatch
from .models import learner
from .peers import ours, others

class Clock:
    "Adds up the time in the functions it wraps"
    def __init__(self):
        self.ours = 0.
        self.calls = 0
        self.since = None   # when the outermost of these functions began, or went on; None: it is not ours that runs

    def wrap(self, f):
        def timed(*args, **kwargs):
            if self.since is not None: return f(*args, **kwargs)
            self.calls += 1
            self.since = thread_time()
            try: return f(*args, **kwargs)
            finally: self.halt()
        return timed

    def halt(self):
        self.ours += thread_time()-self.since
        self.since = None

    def exempt(self, f):
        "`f` is none of ours, whoever calls it"
        def untimed(*args, **kwargs):
            if self.since is None: return f(*args, **kwargs)
            self.halt()
            try: return f(*args, **kwargs)
            finally: self.since = thread_time()
        return untimed

events = [Callback, callback.RecordCallback, callback.Helper, GradAlert]   # ours have a `__call__` of their own
part = {'TrainEvalCallback','Recorder','CastToTensor','ProgressCallback','NoValid','WithoutNumba'}   # of the step itself

# methods that are given a function to call later
hooks = [(nn.Module, 'register_forward_hook'), (nn.Module, 'register_forward_pre_hook'), (nn.Module, 'register_full_backward_hook'), (nn.Module, 'register_backward_hook'),
         (Tensor, 'register_hook'), (Tensor, 'register_post_accumulate_grad_hook')]

# by which we are called elsewhere
entries = [(Reader, 'guarded'),              # at the end of an epoch
           (callback._LossHook, 'complete'), # at the end of a backward
           (MethodWatch, 'run'),             # in an optimizer's `step` and `zero_grad`,
           (StepWatch, 'before_step'), (StepWatch, 'after_step')]   # in one of torch

def replaced(clock, steps)->dict: # (object, attribute) -> what is there while a clock watches
    def event(call):
        timed = clock.wrap(call)
        return lambda self, name: (call if type(self).__name__ in part else timed)(self, name)

    def register(f): return lambda self, hook, *args, **kwargs: f(self, clock.wrap(hook), *args, **kwargs)

    def one_batch(self, *args):
        ours,calls,start = clock.ours,clock.calls,thread_time()
        of_fastai(self, *args)
        steps.append((thread_time()-start, clock.ours-ours, clock.calls-calls))

    of_fastai,hook_of_all,original = Learner.one_batch,capture.register_module_forward_hook,MethodWatch.original
    return {(Learner, 'one_batch'): one_batch,
            (capture, 'register_module_forward_hook'): lambda f: hook_of_all(clock.wrap(f)),
            (MethodWatch, 'original'): lambda self, obj: clock.exempt(original(self, obj)),
            **{(cls, '__call__'): event(cls.__call__) for cls in events},
            **{(cls, name): register(getattr(cls, name)) for cls,name in hooks},
            **{(cls, name): clock.wrap(getattr(cls, name)) for cls,name in entries}}

@contextmanager
def watch(clock, steps):
    "Time what is ours, and append to `steps` the seconds of each step, the part of them that is ours, and calls"
    with ExitStack() as stack:
        for (obj,name),new in replaced(clock, steps).items(): stack.enter_context(mock.patch.object(obj, name, new))
        yield

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
