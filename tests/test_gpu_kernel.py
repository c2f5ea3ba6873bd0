"The kernels of a GPU, without one: interpreted on the CPU, compiled for GPUs that are not there, launches counted."
import os,subprocess,sys,warnings
import numpy as np,pytest,torch
from fastai.basics import *
from unittest import mock
pytest.importorskip('triton', reason='the kernels of a GPU are written in Triton')
from fastai_gradstats import GradNormCallback,GradStatsCallback
from fastai_gradstats.by_gpu_kernel import SWITCH,device_buffer,has_address,prepare_kernels,prove
from fastai_gradstats.by_rows import RowBuffer
from fastai_gradstats.gpu_launch import DTYPES
from fastai_gradstats.stats import finish,measure
from helpers.gpu import gpu_buffer,in_place_of_cpu,interpreted,patched_once
from helpers.project import ROOT
from helpers.training import fit
sys.path.insert(0, str(ROOT))
from benchmarks.traffic import CountedKernels

@pytest.fixture(scope='module')
def kernels():
    with patched_once(): yield interpreted()

floats = 'max_abs','mean_abs','norm','mean','std'

def compare(buffer, tensors):
    "Rows of a buffer against the definitions"
    _,numel,sums,_ = buffer.read(buffer.fetched, buffer.end)
    found,counts = finish(sums, numel)
    for i,t in enumerate(tensors):
        want = measure(t)
        np.testing.assert_allclose(found[:,i], [want[k] for k in floats], rtol=5e-6, atol=5e-6*want['mean_abs'], err_msg=f'{i}: {tuple(t.shape)} {t.dtype}')
        assert counts[:,i].tolist()==[t.numel(), want['zeros'], want['nonfinite'], want['above']]

@pytest.mark.parametrize('sizes', ((7,), pytest.param((1,2049), marks=pytest.mark.slow)), ids=str)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_proved(dtype, sizes, kernels):
    "What is proved on a GPU before it is used holds here"
    with np.errstate(all='ignore'): prove(kernels, [dtype], sizes)

layouts = dict(
    channels_last=lambda x: x.view(4,5,6,7).to(memory_format=torch.channels_last), transposed=lambda x: x.view(20,42).t(), permuted=lambda x: x.view(4,5,6,7).permute(2,0,3,1),
    scalar=lambda x: x[:1].expand(5000), rows=lambda x: x[:50].expand(60,50), columns=lambda x: x[:60,None].expand(60,50), slice=lambda x: x.view(20,42)[:,3:17],
    steps=lambda x: x[::3], steps_2d=lambda x: x.view(20,42)[::2,::3], holes_4d=lambda x: x.view(4,5,6,7)[::2,::2,::2,::2], holes_5d=lambda x: x[:768].view(4,4,4,4,3)[::2,::2,::2,::2,::2],
    overlap=lambda x: x.as_strided((10,20), (3,1)), middle=lambda x: x[:20].view(4,1,5).expand(4,3,5), offset=lambda x: x[3:])

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_layouts(dtype, kernels):
    torch.manual_seed(0)
    x = torch.randn(840).to(dtype)
    tensors = [f(x) for f in layouts.values()]
    b = gpu_buffer(kernels)
    for i,t in enumerate(tensors): b.put(i, t)
    assert len(b.unmerged)==len(tensors) and not b.waiting   # a kernel has read each of them
    compare(b, tensors)

def test_chunks_of_every_size(kernels):
    "Some steps to a program, and edges in each of them"
    from fastai_gradstats import by_gpu_kernel
    torch.manual_seed(0)
    x = torch.randn(20011)*1e-25+1e-24
    with mock.patch.object(by_gpu_kernel, 'MOST_PROGRAMS', 1):
        b = gpu_buffer(kernels)
        for i in range(4): b.put(i, x[i:])
        compare(b, [x[i:] for i in range(4)])

def net(): return nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4,8,3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32,3))

def run_of(model=net):
    set_seed(0)
    batches = [(torch.randn(8,1,12,12), torch.randint(3, (8,))) for _ in range(3)]
    learn = Learner(DataLoaders(batches, batches[:1]), model(), loss_func=nn.CrossEntropyLoss(), cbs=[GradStatsCallback(hist='all'),GradNormCallback(update_every=1)])
    fit(learn, 1)
    return learn

def test_learner():
    "A training that is read by the kernels has the record of one that the CPU reads, and the same weights"
    plain = run_of()
    with in_place_of_cpu() as kernels: learn = run_of()
    assert kernels.error is None
    for p,q in zip(plain.model.parameters(), learn.model.parameters()): assert torch.equal(p, q)
    for ours,other in ((learn.grad_stats.df,plain.grad_stats.df), (learn.grad_norm.df,plain.grad_norm.df), (learn.grad_norm.record.frame('params'),plain.grad_norm.record.frame('params'))):
        exact = [c for c in ours if ours[c].dtype.kind!='f']
        pd.testing.assert_frame_equal(ours[exact], other[exact])
        for c in ours.columns.difference(exact):
            unit = other['mean_abs'] if c=='mean' else other['norm']*other['weight_norm'] if c=='dot' else abs(other[c])
            assert ((abs(ours[c]-other[c]) <= 3e-6*unit) | (ours[c]==other[c]) | ours[c].isna() & other[c].isna()).all(), c
    pd.testing.assert_frame_equal(learn.grad_stats.hist_df, plain.grad_stats.hist_df)

def test_first_nonfinite():
    "The layer whose output broke first is named"
    class Breaks(Module):
        def forward(self, x): return x*torch.where(x[:1]==x[:1], torch.nan, 1.)
    model = lambda: nn.Sequential(nn.Flatten(), nn.Linear(144,8), Breaks(), nn.Linear(8,8), nn.Linear(8,3))
    with in_place_of_cpu() as kernels: learn = run_of(model)
    assert kernels.error is None
    assert learn.grad_stats.first_nonfinite()==run_of(model).grad_stats.first_nonfinite()

def test_launches_of_a_step():
    "One for an output and one more for its forward check, one for all parameters, one to find what broke; records are merged later"
    counted = CountedKernels()
    with in_place_of_cpu(counted):
        learn = run_of()
    names = [name for name,*_ in counted.launches]
    recorded = 4   # layers with parameters
    assert names.count('read_one')==names.count('flag')==3*recorded
    assert names.count('first_flag')==3 and names.count('merge')==1
    assert names.count('read_all')==3*2   # of gradients, and how far weights moved

def test_sizes_agree():
    "What the host knows of the kernels without importing Triton"
    from fastai_gradstats import by_gpu_kernel,gpu_launch,kernel_gpu
    assert (by_gpu_kernel.STEP,gpu_launch.WARPS)==(kernel_gpu.STEP.value,kernel_gpu.WARPS.value)
    assert (by_gpu_kernel.RECORD_BYTES,by_gpu_kernel.DESCRIPTION_BYTES)==(4*kernel_gpu.RECORD.value,8*kernel_gpu.DESCRIPTION.value)

# --- what must not be read by address, and what happens where a kernel fails

def test_gate():
    x = torch.randn(6)
    from torch._subclasses import FakeTensorMode
    with FakeTensorMode() as mode: fake = mode.from_tensor(x)
    class Sub(Tensor): pass
    inside = []
    torch.vmap(lambda t: inside.append(has_address(t)) or t)(x)
    odd = [fake, torch.empty(3, device='meta'), x.as_subclass(Sub), torch.complex(x, x).conj().imag, torch._efficientzerotensor(3), x[:0]]
    assert has_address(x) and has_address(nn.Parameter(x)) and not any(map(has_address, odd)) and inside==[False]

@pytest.mark.parametrize('name', ('read_one','read_all','flag','first_flag','merge'))
def test_failing_launch(name):
    "Any error of a launch: the rest is read without kernels. Nothing is wrong, nothing stops"
    kernels = interpreted()
    def broken(*args): raise RuntimeError('no such launch')
    for key in list(kernels.ready):
        if key[0]==name: kernels.ready[key] = broken
    plain = run_of()
    with warnings.catch_warnings(), in_place_of_cpu(kernels):
        warnings.simplefilter('ignore')
        learn = run_of()
    ours,other = learn.grad_stats.df,plain.grad_stats.df
    assert str(kernels.error)=='no such launch'
    if name=='merge':   # these numbers are lost, and none is wrong
        assert len(ours)==len(other) and ours['norm'].isna().all()
        return
    pd.testing.assert_frame_equal(ours[['name','iteration','zeros','above']], other[['name','iteration','zeros','above']])
    np.testing.assert_allclose(ours['norm'], other['norm'], rtol=3e-6)

def test_without_a_gpu():
    with mock.patch.dict(os.environ, {SWITCH:'1'}), pytest.warns(UserWarning, match='are read without kernels'):
        assert prepare_kernels(torch.device('cuda', 7), [torch.float32]) is None
    assert type(device_buffer(torch.device('cuda', 7)) if torch.cuda.is_available() else device_buffer(torch.device("cpu"))) is RowBuffer
    assert prepare_kernels(torch.device('cuda', 8), [torch.float32]) is None   # nobody asked: no warning

compiles = """
import sys, triton.language as tl
from triton.backends.compiler import GPUTarget
from fastai_gradstats import kernel_gpu
from fastai_gradstats.gpu_launch import READING, SIZES, compile_for
target = GPUTarget('cuda', int(sys.argv[1]), 32) if sys.argv[1].isdigit() else GPUTarget('hip', sys.argv[1], 64)
for name in (*READING,'octaves','merge','first_flag'):
    for dtype in ('float32','bfloat16','float16','float64') if name in READING else ('float32','bfloat16') if name=='octaves' else (None,):
        constants = {} if dtype is None else dict(DT=getattr(tl, dtype))
        if name in SIZES: constants['SIZE'] = SIZES[name]
        asm = compile_for(target, kernel_gpu, name, constants).asm
        code = asm.get('ptx') or asm['amdgcn']
        wide = code.count('ld.global.v4') + code.count('load_dwordx4')
        print(name, dtype, code.count('.f64') if 'ptx' in asm else 0, code.count('.local') if 'ptx' in asm else int(code.split('.vgpr_spill_count:')[1].split()[0]), wide)
"""

@pytest.mark.slow
@pytest.mark.parametrize('target', ('75','80','90','gfx942'))
def test_compiles(target):
    "For GPUs that are not here: no spills, no float64 where gradients are narrower but for one conversion, loads of 128 bits"
    env = {k:v for k,v in os.environ.items() if k!='TRITON_INTERPRET'}
    said = subprocess.run([sys.executable, '-c', compiles, target], env=env, capture_output=True, text=True)
    assert not said.returncode, said.stderr[-2000:]
    lines = [line.split() for line in said.stdout.splitlines()]
    assert len(lines)==20
    for name,dtype,float64,spills,wide in lines:
        assert spills=='0', (name,dtype)
        if dtype in ('float32','bfloat16','float16') and name!='octaves': assert int(float64)<=1, (name,dtype)   # of the scale, once a tensor
        if name in ('read_one','read_all','flag') and dtype!='float64': assert int(wide)>0, (name,dtype)
