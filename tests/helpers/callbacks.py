"What is put beside our callbacks, and our own read in another way."
import math,pytest,signal,sys,torch
from contextlib import contextmanager
from threading import RLock
from fastai.basics import *
from fastai.callback.fp16 import MixedPrecision
from torch import nn
from unittest.mock import patch as mock
from fastai_gradstats import GradStatsCallback,by_kernel
from fastai_gradstats.engine import Ledger

# --- how gradients are read

class ByRows(GradStatsCallback):
    "With the engine that a GPU would use"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._consumer.by_rows = True

@contextmanager
def read_by(path):
    "One of the engine's ways to read: 'kernel', 'blocks' (without numba), 'rows' (as on a GPU without kernels) or 'gpu' (its kernels, interpreted); gives `Engine`'s argument"
    if path=='gpu':
        pytest.importorskip('triton', reason='the kernels of a GPU are written in Triton')
        from .gpu import in_place_of_cpu
        with in_place_of_cpu(): yield None
        return
    with mock.object(by_kernel, 'find_kernel', (lambda: None) if path=='blocks' else by_kernel.find_kernel): yield True if path=='rows' else None

each_reader = pytest.mark.parametrize('by_rows', ('kernel', 'blocks', 'rows'), indirect=True)   # the fixture is in conftest.py
each_reader_and_slow_gpu = pytest.mark.parametrize('by_rows', ('kernel', 'blocks', 'rows', pytest.param('gpu', marks=pytest.mark.slow)), indirect=True)
each_reader_and_gpu = pytest.mark.parametrize('by_rows', ('kernel', 'blocks', 'rows', 'gpu'), indirect=True)   # interpreted kernels are slow

# --- what is trained, and how

class Seed(Callback):
    "The same dropout in both routes"
    order,run_valid = -9,False
    def before_batch(self): torch.manual_seed(7)

class TrainOnly(Callback):
    "No validation"
    def before_validate(self): raise CancelValidException('not needed')

class CPUAmp(MixedPrecision):
    "fastai's MixedPrecision hard-codes 'cuda'; the same on a CPU"
    def __init__(self, dtype=torch.float32, **kwargs):
        super().__init__()
        self.dtype,self.kwargs = dtype,kwargs
    def before_fit(self):
        self.autocast = torch.autocast('cpu', self.dtype, enabled=self.dtype!=torch.float32)
        self.learn.scaler,self.scales = torch.amp.GradScaler('cpu', **self.kwargs),L()

class Overflow(Callback):
    "Breaks the loss of some iterations"
    order = 5
    def __init__(self, its): self.its = its
    def before_backward(self):
        if self.iter in self.its: self.learn.loss_grad = self.loss_grad*torch.inf

class OwnClip(Callback):
    "Somebody's own clipping"
    order = 12
    def before_step(self): nn.utils.clip_grad_norm_(self.model.parameters(), .2)

# --- who acts on gradients

def total_norm(ts):
    "Of several tensors, in float64"
    return math.sqrt(sum(t.double().square().sum().item() for t in ts))

def acting_callback(f, **attrs):
    "A callback class whose events, given by name, call `f(model)`"
    event = attrs.pop('at', 'before_step')
    return type('Acts', (Callback,), {'run_valid':False, **attrs, event: lambda self: f(self.learn.model)})

def clip_gradients(model): nn.utils.clip_grad_norm_(model.parameters(), .1)

class Dropper(Callback):
    "Drops what is too large"
    run_valid = False
    def __init__(self, event, exc, clear, order):
        self.exc,self.clear,self.order,self.dropped = exc,clear,order,[]
        setattr(self, event, self.drop)
    def drop(self):
        norm = total_norm(p.grad for p in self.learn.model.parameters())
        if norm<5: return
        self.dropped.append(norm)
        self.clear(self.learn)
        raise self.exc('too large')
def leave_gradients(learn): pass

# --- who cancels and raises

class RaisesAt(Callback):
    "Raises `exc` once, in `event` at iteration `at`"
    def __init__(self, exc, event, at, order):
        self.exc,self.at,self.order,self.done = exc,at,order,False
        setattr(self, event, self._raise)
    def _raise(self):
        if self.done or not hasattr(self.learn, 'epoch') or getattr(self.learn, 'iter', 0)<self.at: return
        self.done = True
        raise self.exc('test')

cancel_events = '''before_epoch before_train before_batch after_pred after_loss before_backward after_backward before_step
    after_step after_batch after_train before_validate after_epoch'''.split()
cancel_exceptions = [CancelBatchException, CancelBackwardException, CancelStepException,
    CancelTrainException, CancelEpochException, CancelFitException, KeyboardInterrupt, RuntimeError]

class CtrlC:
    "Sends an interrupt at the `at`-th line that these rooms of the package run: our callbacks, recorder and engine, unless told"
    def __init__(self, at, rooms='callback recorder consumers forward watch engine buffer by_rows by_kernel'):
        self.at,self.n,self.where = at,0,None
        self.rooms = {f'{room}.py' for room in rooms.split()}
    def __call__(self, frame, event, arg):
        path = Path(frame.f_code.co_filename)
        if path.name in self.rooms and path.parent.name=='fastai_gradstats': return self.line
    def line(self, frame, event, arg):
        self.n += event=='line'
        if self.n==self.at and self.where is None:
            self.where = f'{frame.f_code.co_name}, line {frame.f_lineno}'
            signal.raise_signal(signal.SIGINT)
        return self.line
    def __enter__(self): self.old = sys.gettrace(); sys.settrace(self)
    def __exit__(self, *args):
        sys.settrace(self.old)
        Ledger.lock = RLock()   # what a trace raises as a `with` ends leaves its lock behind; the interpreter raises no interrupt there
