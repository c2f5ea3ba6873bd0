"""What reading costs a GPU, counted on one that is not there: launches and bytes that both callbacks add to a step

By rows, torch moves the bytes, and each tensor of an operation counts once. By kernels, each launch says what it reads. What a program reads
a second time counts once, since it is in the cache: gradients beside their weights, and a chunk for which float32 was too narrow."""
from contextlib import ExitStack, contextmanager
from functools import partial
from time import perf_counter
from unittest import mock
import warnings
import pandas as pd
import torch
from fastai.basics import Callback
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torchvision.models import resnet18, resnet50
from fastai_gradstats import by_gpu_kernel, engine
from fastai_gradstats.by_gpu_kernel import DESCRIPTION_BYTES, RECORD_BYTES_OF, GpuBuffer, Table, has_address
from fastai_gradstats.gpu_launch import DTYPES, Kernels
from . import counts
from .models import images
from .peers import both, reader_of

class Bytes(counts.Ops):
    "Counts also the bytes of operations that are work: of each tensor among arguments and results once, as large as it is"
    def clear(self):
        super().clear()
        self.bytes = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        before = self.work
        result = super().__torch_dispatch__(f, types, args, kwargs)
        if self.work>before:
            tensors = {id(t):t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor) and t.device.type!='cpu'}
            self.bytes += sum(t.numel()*t.itemsize for t in tensors.values())
        return result

# --- by kernels

class NoKernels(Kernels):
    "All of them, and a launch does nothing"
    def __init__(self, device=torch.device('cpu')):
        super().__init__(device, None)
        self.prepare(DTYPES, with_octaves=True)
    def constants(self, name, dtype): return dict(name=name, dtype=dtype)
    def build(self, name, constants): return lambda programs, *arguments: None

class CountedKernels(NoKernels):
    "What would be launched"
    def __init__(self, *args):
        super().__init__(*args)
        self.clear()

    def clear(self):
        self.launches = []   # name, dtype, programs, arguments
        self.elements = []   # of each table, in the order of their launches

    def build(self, name, constants):
        def launch(programs, *arguments): self.launches.append((name, constants['dtype'], programs, arguments))
        return launch

    def bytes(self)->int:
        "What these launches read, and what they write and merge"
        total,unmerged,tables = 0,0,iter(self.elements)
        for name,dtype,programs,arguments in self.launches:
            read,records = 0,0
            match name,arguments:
                case 'flag',(_, _, n, *_): read = n*dtype.itemsize
                case 'read_one',(_, _, n, *_):
                    read = n*dtype.itemsize
                    records = programs*RECORD_BYTES_OF[dtype]+DESCRIPTION_BYTES
                case 'read_all',(_, _, tensors, *_, with_weights):
                    read = next(tables)*dtype.itemsize*(1+with_weights)
                    records = programs*RECORD_BYTES_OF[dtype]+tensors*DESCRIPTION_BYTES
                case 'first_flag',(_, _, outputs, *_): read = outputs*4
                case 'merge',(_, _, columns):
                    read = unmerged+programs*columns*8
                    unmerged = 0
                case _: raise ValueError(f"nobody has said what {name} reads")
            total += read+records
            unmerged += records
        return total

    @contextmanager
    def tables_noted(self):
        "A launch for a table has no number of elements among its arguments"
        send = Table.at
        def at(table, addresses):
            self.elements.append(sum(table.sizes))
            return send(table, addresses)
        with mock.patch.object(Table, 'at', at): yield

    @contextmanager
    def in_place_of_cuda(self):
        "Engines launch these on a faked device, whose tensors have no address"
        def seen(t): return isinstance(t, FakeTensor) and t.numel()>0 or has_address(t)
        new = ((by_gpu_kernel, 'has_address', seen), (engine, 'prepare_kernels', lambda *args, **kwargs: self),
               (engine, 'device_buffer', lambda device, *args: GpuBuffer(device, *args, kernels=self)))
        with self.tables_noted(), ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter('ignore')   # the address of a tensor without numbers is 0
            for obj,name,value in new: stack.enter_context(mock.patch.object(obj, name, value))
            yield

class WithLaunches(Bytes):
    "Counts launches of ours as well"
    def __init__(self, kernels):
        self.kernels = kernels
        super().__init__()
    def clear(self):
        super().clear()
        self.kernels.clear()

class Merge(Callback):
    "At the end of each step, and not of many: so that it is among what is counted"
    order = 1000
    def after_batch(self):
        for b in reader_of(self.learn).engine.buffers.values(): b.reduce()

# --- of a step

def step(model, batch, cbs, ops=Bytes):
    "Operations of the third step, the first two of which make what is kept"
    with mock.patch.object(counts, 'Ops', ops): return counts.device_step(model, batch, cbs)

def step_by_rows(model, batch):
    "Launches and bytes"
    ops = step(model, batch, both())
    return ops.work,ops.bytes

def step_by_kernels(model, batch):
    kernels = CountedKernels()
    with kernels.in_place_of_cuda(): ops = step(model, batch, [*both(), Merge()], partial(WithLaunches, kernels))
    return ops.work+len(kernels.launches),ops.bytes+kernels.bytes()

ways = {'by kernels':step_by_kernels, 'by rows':step_by_rows}

def once(model, batch):
    "Bytes of what is read, each tensor once: gradients of outputs, outputs, gradients of parameters and weights"
    model,(x,_) = model().to('meta'),batch()
    outputs = []
    for m in model.modules():
        if m._parameters: m.register_forward_hook(lambda m,i,o: outputs.append(o))
    model(x.to('meta'))
    return 2*sum(t.numel()*t.itemsize for t in (*outputs, *model.parameters()))

cases = {  # name -> functions that make the model and its batch
    'resnet18, 32x3x64x64':   (partial(resnet18, num_classes=10), partial(images, 32, 64)),
    'resnet50, 32x3x224x224': (resnet50, partial(images, 32, 224))}
small_cases = {name:case for name,case in cases.items() if 'resnet18' in name}

def gpu_traffic(cases=cases)->pd.DataFrame:
    "Of each model and way: launches and bytes that both callbacks add to a step on a GPU, and the bytes of reading everything once"
    rows = []
    for name,(model,batch) in cases.items():
        bare = step(model, batch, [])
        minimum = once(model, batch)
        for way,count in ways.items():
            launches,moved = count(model, batch)
            moved -= bare.bytes
            rows.append(dict(model=name, way=way, launches=launches-bare.work, launches_bare=bare.work, bytes=moved, minimum=minimum, ratio=moved/minimum))
    return pd.DataFrame(rows)

# --- on the host

def microseconds(f, after=lambda: None, calls=20, rounds=2000):
    "Of a call, in the fastest of many rounds"
    best = float('inf')
    for _ in range(rounds):
        start = perf_counter()
        for _ in range(calls): f()
        best = min(best, perf_counter()-start)
        after()
    return best/calls*1e6

def host_time(rounds=2000)->pd.DataFrame:
    "What the host does for a launch, without the launch"
    cpu = torch.device('cpu')
    e = engine.Engine()
    b = e.buffers[cpu] = GpuBuffer(cpu, kernels=NoKernels())
    flags = b.flags_of(1)
    x = torch.randn(64, 64, 8, 8)
    many = [torch.randn(64) for _ in range(60)]
    return pd.DataFrame([
        dict(what='a gradient of an output', us=microseconds(lambda: e.put(0, x), e.discard, rounds=rounds)),
        dict(what='the forward check of an output', us=microseconds(lambda: flags.flag(x, 0, 0), rounds=rounds)),
        dict(what='a parameter, of 60', us=microseconds(lambda: e.put_all(range(60), many, many), e.discard, calls=1, rounds=rounds)/60)])

if __name__=='__main__':
    print(gpu_traffic().to_string(index=False))
    print(host_time().to_string(index=False))
