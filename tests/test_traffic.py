"What a step costs a GPU that is not there: launches and bytes, by kernels and by rows."
import ctypes,sys
import numpy as np,pytest,torch
from collections import Counter
from torch import nn
from fastai_gradstats.by_gpu_kernel import GpuBuffer
from helpers.project import ROOT
from helpers.training import host
sys.path.insert(0, str(ROOT))
from benchmarks import traffic
from benchmarks.peers import both

@pytest.mark.parametrize('name,by_kernels,by_rows', [('resnet18, 32x3x64x64', 90, 200), pytest.param('resnet50, 32x3x224x224', 225, 800, marks=pytest.mark.slow)])
def test_traffic(name, by_kernels, by_rows):
    "By kernels two launches for an output and a few for all parameters, and each number once; by rows a constant number beside two for an output, and ten times the bytes"
    found = traffic.gpu_traffic({name:traffic.cases[name]}).set_index('way')
    outputs = 41 if 'resnet18' in name else 107
    assert 2*outputs<found.launches['by kernels']<=by_kernels and 2*outputs<found.launches['by rows']<=by_rows
    assert 1<found.ratio['by kernels']<=1.05 and 1<found.ratio['by rows']<=10

def test_minimum():
    "Of a linear layer with 3 inputs and 2 outputs and a batch of 5: outputs, weights, bias, and gradients of all"
    case = (lambda: nn.Linear(3, 2)),(lambda: (torch.randn(5,3), torch.randint(2, (5,))))
    assert traffic.once(*case)==2*4*(5*2+3*2+2)

def test_bytes_of_launches():
    "Each gradient, weight and output once, and what is written: records of 64 bytes, descriptions of 64, rows"
    kernels = traffic.CountedKernels()
    b = GpuBuffer(host, kernels=kernels)
    gs = [torch.randn(n) for n in (3000, 10)]
    with kernels.tables_noted():
        b.put(0, gs[0].double())
        b.put_all([1,2], gs, gs)
        b.put_all([3,4], gs)
    b.flags_of(1).flag(gs[0].half(), 0, 0)
    records = 2*128+64 + 2*(3*64+2*64)
    assert kernels.bytes()==3000*8 + 3*3010*4 + 3000*2 + records
    b.merge()
    assert kernels.bytes()==3000*8 + 3*3010*4 + 3000*2 + 2*records + 5*b.columns*8

def test_tables_say_what_is_read():
    "What a launch of `read_all` is told to read, by the table that is behind its first argument"
    kernels = traffic.CountedKernels()
    b = GpuBuffer(host, kernels=kernels)
    gs,ws = ([torch.randn(n) for n in (3, 5000, 64)] for _ in range(2))
    with kernels.tables_noted(): b.put_all([0,1,2], gs, ws)
    (name,dtype,_,(table,_,tensors,*_)), = kernels.launches
    columns = np.ctypeslib.as_array((ctypes.c_int64*(6*tensors)).from_address(table)).reshape(6, tensors)
    starts,of_weights,heads,sizes,*_ = columns
    assert (name,dtype)==('read_all',torch.float32) and kernels.elements==[sizes.sum()] and sizes.tolist()==[3,5000,64]
    assert (starts+4*heads).tolist()==[g.data_ptr() for g in gs] and (of_weights+4*heads).tolist()==[w.data_ptr() for w in ws]

def test_launches_on_a_faked_device():
    "The same ones as where there are numbers"
    kernels = traffic.CountedKernels()
    model,batch = (lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))),(lambda: (torch.randn(8,3,4,4), torch.randint(10, (8,))))
    with kernels.in_place_of_cuda(): traffic.step(model, batch, [*both(), traffic.Merge()], lambda: traffic.WithLaunches(kernels))
    assert Counter(name for name,*_ in kernels.launches)==dict(flag=2, read_one=2, read_all=1, first_flag=1, merge=1)

def test_host_time(): assert (traffic.host_time(rounds=2)['us']>0).all()
