"A GPU that is not there: its kernels run by Triton's interpreter"
import contextlib
from dataclasses import replace
from unittest import mock
import torch
from triton.runtime import interpreter
from fastai_gradstats import engine
from fastai_gradstats.by_gpu_kernel import GpuBuffer
from fastai_gradstats.gpu_launch import DTYPES,InterpretedKernels

the_cpu = torch.device('cpu')

@contextlib.contextmanager
def patched_once():
    """Triton's interpreter exchanges its language around each call of a kernel's function; once a launch is enough, and four times as fast.
    Nor does it calculate whether integers overflow: it has nobody to tell (`debug` is off)"""
    patch,launch,done = interpreter._patch_lang,interpreter.GridExecutor.__call__,set()
    builder = interpreter.interpreter_builder
    unchecked = replace(builder.options, sanitize_overflow=False)
    def once(function):
        module = id(function.__globals__)
        if module in done: return None
        done.add(module)
        return patch(function)
    def launched(self, *args, **kwargs):
        done.clear()
        try: return launch(self, *args, **kwargs)
        finally: done.clear()
    with (mock.patch.object(interpreter, '_patch_lang', once), mock.patch.object(interpreter.GridExecutor, '__call__', launched),
          mock.patch.object(builder, 'options', unchecked)): yield

def interpreted(dtypes=tuple(DTYPES), with_octaves=True):
    kernels = InterpretedKernels()
    kernels.prepare(dtypes, with_octaves)
    return kernels

def gpu_buffer(kernels=None, *args, **kwargs): return GpuBuffer(the_cpu, *args, kernels=kernels or interpreted(), **kwargs)

@contextlib.contextmanager
def in_place_of_cpu(kernels=None):
    "Engines read what is on the CPU by the kernels of a GPU"
    kernels = kernels or interpreted()
    with mock.patch.object(engine, 'host_buffer', lambda device, *args: GpuBuffer(device, *args, kernels=kernels)), patched_once(): yield kernels
