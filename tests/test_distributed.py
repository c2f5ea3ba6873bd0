"Several processes (DDP, FSDP2 with gloo on the CPU) give the numbers of one process on the joint batch; the first process keeps the record."
import importlib.util,os,pickle,sys,traceback,warnings
from datetime import timedelta
import numpy as np,pytest,torch
import torch.distributed as dist, torch.multiprocessing as mp
from fastai.basics import *
from fastai.callback.training import GradientAccumulation,GradientClip
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate,Shard,distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from fastai_gradstats import GradNormCallback,GradStatsCallback
from fastai_gradstats.engine import Engine
from fastai_gradstats.histogram import octaves
from fastai_gradstats.stats import DOT,W_SQ,finish,measure
from helpers.callbacks import OwnClip
from helpers.oracles import GradSpy,output_grads
from helpers.training import fit,fsdp_runs_here

class ShardedNet(nn.Module):
    "Shards of many kinds over two processes: even, uneven (3 rows), empty (1 row), one larger than the engine's small tensors"
    def __init__(self):
        super().__init__()
        self.a,self.norm,self.b,self.c,self.head = nn.Linear(20,201),nn.LayerNorm(201),nn.Linear(201,3),nn.Linear(3,1,bias=False),nn.Linear(4,5)
    def forward(self, x):
        x = self.b(torch.tanh(self.norm(self.a(x))))
        return self.head(torch.cat([x, self.c(x)], 1))

def joint_data(n=64, bs=16):
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(n+16,20, generator=g),torch.randint(5, (n+16,), generator=g)
    return DataLoaders(*(DataLoader(L(zip(x[s],y[s])), bs=bs) for s in (slice(n),slice(n,None))))

def joint_learner(cbs, wrap=noop, model=ShardedNet, opt_func=SGD, data=joint_data):
    dls = data()
    set_seed(0)
    return Learner(dls, wrap(model()), loss_func=nn.CrossEntropyLoss(), opt_func=opt_func, lr=.1, cbs=cbs)

class HalfOfTraining(Callback):
    "Each process takes its half of each batch"
    order = -9
    def before_batch(self):
        if self.training: self.learn.xb,self.learn.yb = ([t.chunk(2)[dist.get_rank()] for t in b] for b in (self.xb,self.yb))

class DDP(HalfOfTraining):
    def before_fit(self): self.learn.model = DistributedDataParallel(self.model)
    def after_fit(self): self.learn.model = self.model.module

class Accelerated(DDP):
    "accelerate wraps the model"
    def before_fit(self):
        from accelerate import Accelerator
        self.learn.model = Accelerator(cpu=True).prepare(self.model)

class Distrib(HalfOfTraining):
    "What fastai's `distrib_ctx` adds to a Learner, with a loader that does not need CUDA to shuffle"
    def __new__(cls):
        from fastai.distributed import DistributedDL,DistributedTrainer
        DistributedDL._broadcast = lambda self, t, rank: (dist.broadcast(t := tensor(t), rank), t.tolist())[1]
        return DistributedTrainer(cpu=True)

def halved_data():
    "fastai gives each process a half of the data, which its loader divides into batches: the joint batches"
    dls = joint_data()
    if dist.is_initialized(): return dls
    ds = dls.train.dataset
    a,b = ds[:32],ds[32:]
    return DataLoaders(DataLoader(a[:16]+b[:16]+a[16:]+b[16:], bs=32), dls.valid)

class Poison(Callback):
    "A NaN in one element of one gradient, in the shard of process `rank`"
    order,run_valid = 5,False
    def __init__(self, rank=0): self.rank = rank
    def before_step(self):
        g = self.model.a.weight.grad
        if not hasattr(g, 'to_local'): g[-1 if self.rank else 0,0] = torch.nan
        elif dist.get_rank()==self.rank: g.to_local()[-1 if self.rank else 0,0] = torch.nan

# --- what runs in two processes

def frames_of(learn, *cbs):
    "The records of this process, and its weights"
    w = {n:getattr(p, 'full_tensor', lambda: p)().detach().clone() for n,p in learn.model.named_parameters()}
    return dict(weights=w, **{type(c).__name__:c.df for c in cbs}, **{'by':c.by('param') for c in cbs if isinstance(c, GradNormCallback)})

def shard_layers(model, each=True, **kw):
    "FSDP2: layer by layer, then the rest"
    kw = dict(mesh=init_device_mesh('cpu', (2,)), **kw)
    if each:
        for m in (model.a,model.b): fully_shard(m, **kw)
    return fully_shard(model, **kw)

def run_case(wrap, *more, stats=None, norm=None, n=1, before=None, model=ShardedNet, rows=None, **kw):
    "One fit; `stats` and `norm`: arguments, False for none; `rows`: the engine's path for GPUs"
    gcb = [] if stats is False else [GradStatsCallback(**(stats or {}))]
    gnc = [] if norm is False else [GradNormCallback(**(norm or {}))]
    for c in (*gcb,*gnc): c._consumer.by_rows = rows
    learn = joint_learner([*gcb, *gnc, *(o() for o in more)], wrap, model, **kw)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        if before:
            with learn.no_bar(), learn.no_logging(): before(learn)
        fit(learn, n)
    return dict(frames_of(learn, *gcb, *gnc), warned=[str(o.message) for o in w if 'fastai_gradstats' in o.filename or 'radient' in str(o.message)])

class PartlySharded(nn.Module):
    "A module without shards in front of sharded ones"
    def __init__(self): super().__init__(); self.first,self.net = nn.Linear(20,20),ShardedNet()
    def forward(self, x): return self.net(self.first(x))

def shard_some(m): return shard_layers(m, each=False, ignored_params={*m.first.parameters()})
class Sum(Callback):
    "Who leaves a parameter out of FSDP sums its gradient himself"
    order = 4
    def before_step(self):
        for p in self.model.first.parameters():
            dist.all_reduce(p.grad)
            p.grad.div_(2)

def shard_columns(m): return shard_layers(m, each=False, shard_placement_fn=lambda p: Shard(1) if p is m.head.weight else None)

def accumulate(): return GradientAccumulation(32//dist.get_world_size() if dist.is_initialized() else 32)   # it counts the samples of its process

def hybrid(m): return fully_shard(m, mesh=init_device_mesh('cpu', (1,2), mesh_dim_names=('copy','shard')))

cubes = {'cubes': lambda g: (g.float()**3).abs().max()}
# with the default 1e-5, elements whose gradient is rounding noise move by noise, which differs between one process and two
coarse_adam = partial(Adam, eps=.01)
# name -> (wrap, callbacks, arguments); the single process runs the same with neither wrap nor `Half`
shared_cases = {'plain': ((), {}),
        'two epochs': ((), dict(n=2)),
        'validated first': ((), dict(before=lambda l: (l.create_opt(), l.validate()))),
        'every 2 and 3': ((), dict(n=2, stats=dict(every=2), norm=dict(every=3))),
        'every 3 and 2': ((), dict(n=2, stats=dict(every=3), norm=dict(every=2))),
        'params only': ((), dict(stats=dict(kind='param'))),
        'norm alone': ((), dict(stats=False)),
        'stats alone': ((), dict(norm=False)),
        'some': ((), dict(stats=dict(include='a|b'))),
        'clip': ((partial(GradientClip, .1),), {}),
        'own clip': ((OwnClip,), {}),
        'by rows': ((), dict(n=2, rows=True)),
        'by rows, own clip': ((OwnClip,), dict(rows=True)),
        'accumulated': ((accumulate,), {}),
        'adam': ((), dict(opt_func=coarse_adam)),
        'extra': ((), dict(stats=dict(extra=cubes))),
        'updates': ((), dict(norm=dict(update_every=2), opt_func=coarse_adam)),
        'updates, own clip': ((OwnClip,), dict(stats=False, norm=dict(every=2, update_every=2))),
        'nan in 0': ((partial(Poison, 0),), {}),
        'nan in 1': ((partial(Poison, 1),), {})}
of_ddp = 'plain','two epochs','every 2 and 3','clip','own clip','norm alone'
process_cases = {('ddp',k): (noop, (DDP,*c), kw) for k,(c,kw) in shared_cases.items() if k in of_ddp}
process_cases |= {('fsdp',k): (shard_layers, (HalfOfTraining,*c), kw) for k,(c,kw) in shared_cases.items()}
process_cases |= {('fsdp','whole'): (partial(shard_layers, each=False), (HalfOfTraining,), {}),
                  ('fsdp','kept'): (partial(shard_layers, reshard_after_forward=False), (HalfOfTraining,), dict(n=2)),
                  ('fsdp','columns'): (shard_columns, (HalfOfTraining,), {}), ('fsdp','hybrid'): (hybrid, (HalfOfTraining,), {}),
                  ('fsdp','ignored'): (shard_some, (HalfOfTraining,Sum), dict(model=PartlySharded))}

process_cases |= {('ddp','none'): (noop, (DDP,), dict(stats=False, norm=False)),
                  ('fsdp','none'): (shard_layers, (HalfOfTraining,), dict(stats=False, norm=False))}
if importlib.util.find_spec('accelerate'):
    process_cases |= {('accelerate','plain'): (noop, (Accelerated,), {}), ('distrib_ctx','plain'): (noop, (Distrib,), dict(n=2, data=halved_data))}

engine_cases = {('engine',k): (None, (), dict(by_rows=v)) for k,v in (('host',False), ('rows',True))}

def odd_tensors():
    g = torch.Generator().manual_seed(0)
    kinds = [((5,7),torch.float32), ((1,3),torch.float32), ((100,70),torch.float64), ((4,6),torch.bfloat16), ((9,),torch.float32),
             ((3000,3),torch.float32)]
    return [torch.randn(s, generator=g).to(d) for s,d in kinds]

def engine_rows(by_rows):
    "Shards, copies, both dtypes and a plain tensor in one call; an earlier row must not be touched"
    mesh,e = init_device_mesh('cpu', (2,)),Engine(.5, by_rows=by_rows, hist='all')
    pl = [Shard(0), Shard(0), Shard(1), Replicate(), None, Shard(0)]
    gs = [g if p is None else distribute_tensor(g, mesh, [p]) for g,p in zip(odd_tensors(), pl)]
    e.put(9, torch.ones(3))
    e.put_all(range(6), gs, gs)
    e.commit()
    return tuple(e.fetch()[1:])

def worker(rank, folder, names):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='localhost')   # accelerate asks for a rank of its own and an address
    torch.set_num_threads(1)
    for i,name in enumerate(names):
        wrap,cbs,kw = {**process_cases,**engine_cases}[name]
        dist.init_process_group('gloo', init_method=f'file://{folder}/store{i}', rank=rank, world_size=2, timeout=timedelta(seconds=20))
        try: res = dict(rows=engine_rows(**kw)) if wrap is None else run_case(wrap, *cbs, **kw)
        except Exception as e: res = dict(error=f'{e}', trace=traceback.format_exc())
        (folder/f'{i}.{rank}').write_bytes(pickle.dumps(res))
        dist.destroy_process_group()

def start_processes(folder, names):
    "Run cases in two processes; {name: [what rank 0 has, what rank 1 has]}"
    mp.start_processes(worker, (folder,names), nprocs=2, start_method='forkserver')
    return {n:[pickle.loads((folder/f'{i}.{r}').read_bytes()) for r in (0,1)] for i,n in enumerate(names)}

def runs_here(name): return name[0]!='fsdp' or fsdp_runs_here

@pytest.fixture(scope='module')
def ranks(tmp_path_factory): return start_processes(tmp_path_factory.mktemp('ranks'), list(filter(runs_here, [*process_cases,*engine_cases])))

def single_process(name):
    "The same run in this process, on joint batches; also the callback that copied its gradients"
    _,cbs,kw = process_cases[name]
    (spy := GradSpy()),(keep := KeepsBatches())
    cbs = [c for c in cbs if not (isinstance(c, type) and issubclass(c, (HalfOfTraining,Sum)))]
    return run_case(noop, *cbs, lambda: spy, lambda: keep, **kw),spy,keep

class KeepsBatches(Callback):
    "The weights before each batch, and the batch"
    order,run_valid = -8,False
    def __init__(self): self.seen = []
    def before_batch(self): self.seen.append((deepcopy(self.model.state_dict()), self.x, self.y))

# --- the tests

def of_ranks(ranks, name):
    "What each rank has of a case"
    if not runs_here(name): pytest.skip('`fully_shard` of this torch does not run on a CPU')
    for r in ranks[name]: assert 'error' not in r, r['trace']
    return ranks[name]

def same_frames(a, b, but=(), **kw):
    "Two frames are equal, floats to a tolerance"
    assert list(a)==list(b) and len(a)==len(b)
    for c in a:
        if c in but: continue
        if a[c].dtype.kind=='f': np.testing.assert_allclose(a[c], b[c], err_msg=c, **kw)
        else: assert a[c].astype(object).tolist()==b[c].astype(object).tolist(), c

def param_rows(df): return df[df['kind']=='param'].reset_index(drop=True)

@pytest.mark.parametrize('name', process_cases, ids='-'.join)
def test_joint_batch(ranks, name):
    "Parameter rows, norms and weights are those of one process on the joint batch; other processes keep nothing."
    (a,b),(want,spy,_) = of_ranks(ranks, name),single_process(name)
    acts_first = [m for m in (*a['warned'],*b['warned']) if m.startswith('Sum ')]   # a callback that adds up by itself, ahead of the reading
    assert a['warned']+b['warned']==acts_first and bool(acts_first)==(name[1]=='ignored')
    for n,w in want['weights'].items():
        for r in (a,b): np.testing.assert_allclose(r['weights'][n], w, rtol=1e-4, atol=1e-6)   # training itself is the same
    if 'GradStatsCallback' in want:
        same_frames(param_rows(a['GradStatsCallback']), param_rows(want['GradStatsCallback']), rtol=2e-5, atol=1e-7)
        assert len(b['GradStatsCallback'])==0
    if 'GradNormCallback' in want:
        same_frames(a['GradNormCallback'], want['GradNormCallback'], but=('loss','bs'), rtol=1e-5)
        same_frames(a['by'], want['by'], rtol=1e-4, atol=1e-6)
        assert len(b['GradNormCallback'])==len(b['by'])==0

@pytest.mark.parametrize('name', [('ddp','plain'),('fsdp','plain'),('fsdp','two epochs'),('fsdp','nan in 1')], ids='-'.join)
def test_spy(ranks, name):
    "And those of the gradients that the optimizer of the single process got, measured in float64."
    (a,_),(_,spy,_) = of_ranks(ranks, name),single_process(name)
    df = param_rows(a['GradStatsCallback'])
    assert df['step'].nunique()==len(spy.grads)
    for s,gs in enumerate(spy.grads):
        rows = df[df['step']==s]
        assert list(rows['name'])==list(gs)   # no `module.`
        for _,r in rows.iterrows():
            g = gs[r['name']]
            if not np.isfinite(g).all(): assert np.isnan(r['max_abs']) and np.isnan(r['norm']) and r['nonfinite']==(~np.isfinite(g)).sum()
            else:
                np.testing.assert_allclose(r[['max_abs','mean_abs','norm','std']].astype(float),
                                           [np.abs(g).max(), np.abs(g).mean(), np.linalg.norm(g), g.std()], rtol=2e-5, atol=1e-8)
            assert r['numel']==g.size

@pytest.mark.parametrize('name', [('ddp','two epochs'),('fsdp','two epochs')], ids='-'.join)
def test_outputs_are_of_the_first_half(ranks, name):
    "Output rows are of the loss that the first process differentiates, the mean over its own half: twice the joint batch's gradient of the same samples."
    (a,_),(_,_,keep) = of_ranks(ranks, name),single_process(name)
    df = a['GradStatsCallback']
    df,model = df[df['kind']=='output'],ShardedNet()
    names = ['a','norm','b','c','head']
    assert len(df)==5*len(keep.seen)==5*8
    for i,(w,x,y) in enumerate(keep.seen):
        model.load_state_dict(w)
        half = output_grads(model, lambda m: F.cross_entropy(m(x[:8]), y[:8]), names)
        joint = output_grads(model, lambda m: F.cross_entropy(m(x), y), names)
        rows = df[df['iteration']==i].set_index('name')
        assert list(rows.index)==names
        for n in names:
            np.testing.assert_allclose(half[n,0,0], 2*joint[n,0,0][:8], rtol=1e-4, atol=1e-8)
            np.testing.assert_allclose(rows.loc[n,['max_abs','norm']].astype(float), [np.abs(half[n,0,0]).max(), np.linalg.norm(half[n,0,0])], rtol=1e-4)
            assert rows.loc[n,'numel']==half[n,0,0].size

def test_samples_and_loss_are_the_first_half(ranks):
    "The loss and the number of samples are what the first process saw."
    (a,_),(want,_,keep) = of_ranks(ranks, ('ddp','plain')),single_process(('ddp','plain'))
    assert a['GradNormCallback']['bs'].tolist()==[8]*4 and want['GradNormCallback']['bs'].tolist()==[16]*4
    model = ShardedNet()
    for (w,x,y),loss in zip(keep.seen, a['GradNormCallback']['loss']):
        model.load_state_dict(w)
        np.testing.assert_allclose(loss, F.cross_entropy(model(x[:8]), y[:8]).item(), rtol=1e-5)

@pytest.mark.parametrize('kind', ('ddp','fsdp'))
def test_changes_nothing(ranks, kind):
    "Weights without the callbacks, bit for bit, in both processes."
    for a,b in zip(of_ranks(ranks, (kind,'plain')), of_ranks(ranks, (kind,'none'))):
        for n,w in a['weights'].items(): assert torch.equal(w, b['weights'][n]), n

@pytest.mark.parametrize('name', engine_cases, ids='-'.join)
def test_engine(ranks, name):
    "Sums and counts per octave of shards, copies and plain tensors, in every process."
    for r in of_ranks(ranks, name):
        ns,keys,numel,s,h = r['rows']
        assert ns.tolist()==[7] and sorted(keys)==[0,1,2,3,4,5,9]
        f,c = finish(s, numel)
        for k,n,row,f,c,h in zip(keys, numel, s, f.T, c.T, h):
            g = torch.ones(3) if k==9 else odd_tensors()[k]
            exponents,n = g.float()[g!=0].frexp()[1].unique(return_counts=True)
            _,octave,count = octaves(h[None])
            assert dict(zip((octave+1).tolist(), count.tolist()))==dict(zip(exponents.tolist(), n.tolist()))   # frexp's fraction is below 1
            want = measure(g, .5)
            np.testing.assert_allclose(f, [want[o] for o in ('max_abs','mean_abs','norm','mean','std')], rtol=1e-4, atol=1e-6)
            assert c.tolist()==[g.numel(), *(want[o] for o in ('zeros','nonfinite','above'))]
            if k!=9: np.testing.assert_allclose(row[[W_SQ,DOT]], g.double().square().sum(), rtol=1e-5)

# --- one process

def test_data_parallel():
    "On a CPU nn.DataParallel runs the module itself. Parameters as without it, names too; outputs are left out with one warning."
    with pytest.warns(UserWarning, match='DataParallel') as w:
        a = fit_wrapped(nn.DataParallel)
    assert len([o for o in w if 'DataParallel' in str(o.message)])==1
    b = fit_wrapped(noop)
    assert (a.grad_stats.df['kind']=='param').all()
    same_frames(a.grad_stats.df, param_rows(b.grad_stats.df), rtol=0)
    same_frames(a.grad_norm.df, b.grad_norm.df, rtol=0)
    same_frames(a.grad_norm.by('param'), b.grad_norm.by('param'), rtol=0)

def test_data_parallel_params_only():
    "Who asks for parameters only is not warned."
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        fit(joint_learner(GradStatsCallback('param'), nn.DataParallel), 2)

def fit_wrapped(wrap): return fit(joint_learner([GradStatsCallback(), GradNormCallback()], wrap), 2)

def test_fsdp1_is_refused():
    "Flat shards of the first FSDP (which does not run on a CPU) cannot be told apart: a sentence before the first batch. Outputs are served."
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, m): super().__init__(); self._fsdp_wrapped_module = m
        def forward(self, x): return self._fsdp_wrapped_module(x)
    FullyShardedDataParallel.__module__ = 'torch.distributed.fsdp'
    for cb in GradStatsCallback(),GradStatsCallback('param'),GradNormCallback():
        learn = joint_learner(cb, FullyShardedDataParallel)
        with pytest.raises(ValueError, match='fully_shard'): fit(learn)
        assert len(cb.df)==0
    learn = fit(joint_learner(GradStatsCallback('output'), FullyShardedDataParallel))
    assert learn.grad_stats.df['name'].unique().tolist()==['a','norm','b','c','head']

if __name__=='__main__':   # python tests/test_distributed.py fsdp-plain ...
    import tempfile
    from pathlib import Path
    names = [n for n in (*process_cases,*engine_cases) if '-'.join(n) in sys.argv[1:]] or [*process_cases,*engine_cases]
    with tempfile.TemporaryDirectory() as d:
        for n,(a,b) in start_processes(Path(d), names).items(): print('-'.join(n), a.get('trace', 'ok'), b.get('trace', 'ok'))
