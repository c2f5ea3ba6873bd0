"Under `torch.compile` and activation checkpointing: the numbers of the plain run, or a sentence that says why there are none."
import io,pickle,shutil,warnings
import numpy as np,pytest,torch
import torch._dynamo
from fastai.basics import *
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from copy import deepcopy
from fastai_gradstats import GradNormCallback,GradStatsCallback
from helpers.callbacks import Seed
from helpers.oracles import GradSpy,compare_row,output_grads
from helpers.training import both_callbacks,fit,image_data,vector_learner

pytestmark = pytest.mark.usefixtures('fresh_dynamo')

def plain_convnet(): return nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32,10))

def wrapped_learner(wrap=noop, cbs=None, model=plain_convnet, n=32):
    dls = image_data(n)
    set_seed(0)
    return Learner(dls, wrap(model()), loss_func=nn.CrossEntropyLoss(), opt_func=SGD, lr=.05, cbs=cbs)

def compile_warnings(f):
    "What `f` warned of, about compiling"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        f()
    return [str(o.message) for o in w if 'torch._dynamo.reset()' in str(o.message)]

def whole_model(m, **kw): return torch.compile(m, **{'backend':'eager',**kw})
def aot_eager(m): return whole_model(m, backend='aot_eager')
def in_place_compiled(m): m.compile(backend='eager'); return m
def forward_only(m): m.forward = torch.compile(m.forward, backend='eager'); return m
def first_child(m): m[0] = torch.compile(m[0], backend='eager'); return m
def first_child_in_place(m): m[0].compile(backend='eager'); return m
def first_two(m): m[0],m[1] = (torch.compile(o, backend='eager') for o in m[:2]); return m
compile_ways = [whole_model,aot_eager,in_place_compiled,forward_only,first_child,first_child_in_place,first_two]

def overlooked(wrap, names, model=plain_convnet):
    "Those of the modules whose hooks do not run when they come after a first call: torch's word for it, which differs by version"
    net = model()
    modules = {name:net.get_submodule(name) for name in names}
    call,x,ran = wrap(net),torch.randn(4,3,8,8),set()
    call(x)
    for name,module in modules.items(): module.register_forward_hook(torch._dynamo.disable(lambda *args, name=name: ran.add(name)))
    call(x)
    torch._dynamo.reset()
    return [name for name in names if name not in ran]

def check_plain_run(learn, spy, ref, outputs=None):
    "Rows of parameters are the gradients the optimizer got; rows of outputs (of the modules `outputs`) those of the plain run"
    df = learn.grad_stats.df
    ps,os = (df[df['kind']==k] for k in ('param','output'))
    assert ps['step'].nunique()==len(spy.grads)
    for s,gs in enumerate(spy.grads):
        rows = ps[ps['step']==s]
        names = [n.replace('_orig_mod.', '') for n in gs]
        assert list(rows['name'])==names
        for (_,r),g in zip(rows.iterrows(), gs.values()): compare_row(r, g)
    np.testing.assert_allclose(learn.grad_norm.df['norm'], spy.norms, rtol=1e-5)
    want = ref.grad_stats.df
    want = want[(want['kind']=='output') & (True if outputs is None else want['name'].isin(outputs))]
    for c in ('iteration','name','out','call','numel','zeros','above'): assert os[c].astype(object).tolist()==want[c].astype(object).tolist(), c
    for c in ('max_abs','mean_abs','norm','std'): np.testing.assert_allclose(os[c], want[c], rtol=1e-4, atol=1e-9)

def take_ours_off(learn):
    "Take our callbacks off; returns them"
    mine = [c for c in learn.cbs if isinstance(c, (GradStatsCallback,GradNormCallback))]
    learn.remove_cbs(mine)
    return mine

# --- torch.compile

@pytest.mark.parametrize('wrap', compile_ways)
def test_before(wrap):
    "Compiled before the first fit, with the hooks there at the first call: everything, over two fits; validation and prediction between them do no harm."
    learn,ref = wrapped_learner(wrap, [*both_callbacks(), (spy := GradSpy())]),wrapped_learner(cbs=both_callbacks())
    def f():
        for l in (learn,ref):
            fit(l, 2)
            with l.no_bar(), l.no_logging(): l.validate(); l.get_preds()
            fit(l)
    assert compile_warnings(f)==[]
    check_plain_run(learn, spy, ref)

@pytest.mark.parametrize('wrap', compile_ways)
def test_validated_first(wrap):
    "`validate` before the first fit compiles the forward without gradients; training compiles its own, with hooks."
    learn,ref = wrapped_learner(wrap, [*both_callbacks(), (spy := GradSpy())]),wrapped_learner(cbs=both_callbacks())
    def f():
        for l in (learn,ref):
            with l.no_bar(), l.no_logging(): l.validate()
            fit(l)
    assert compile_warnings(f)==[]
    check_plain_run(learn, spy, ref)

@pytest.mark.parametrize('wrap', compile_ways)
def test_hooks_too_late(wrap):
    """Trained before without the callback: dynamo runs the graph that has no hooks. One warning a fit names the remedy; what is
    compiled alone is missing alone; parameters are right."""
    names = ['0','1','5']
    missing = overlooked(wrap, names)
    ref,learn = wrapped_learner(cbs=both_callbacks()),wrapped_learner(wrap, both_callbacks())
    for l in (learn,ref):
        mine = take_ours_off(l)
        fit(l)
        l.add_cbs([*mine, *([spy := GradSpy()] if l is learn else [])])
    w = compile_warnings(lambda: fit(learn, 2))
    fit(ref, 2)
    if missing: assert len(w)==1 and all(repr(name) in w[0] for name in missing)
    else: assert w==[]
    check_plain_run(learn, spy, ref, [name for name in names if name not in missing])

@pytest.mark.parametrize('wrap', [whole_model,in_place_compiled,forward_only,first_child])
def test_remedy(wrap):
    "After `torch._dynamo.reset()` all is there and nothing is said."
    ref,learn = wrapped_learner(cbs=both_callbacks()),wrapped_learner(wrap, both_callbacks())
    for l in (learn,ref):
        mine = take_ours_off(l)
        fit(l)
        l.add_cbs([*mine, *([spy := GradSpy()] if l is learn else [])])
    torch._dynamo.reset()
    assert compile_warnings(lambda: fit(learn))==[]
    fit(ref)
    check_plain_run(learn, spy, ref)

def test_said_once_a_fit():
    learn = wrapped_learner(whole_model)
    fit(learn)
    learn.add_cb(GradStatsCallback('output', every=2))
    assert [len(compile_warnings(lambda: fit(learn, 3))) for _ in range(2)]==[1,1]
    assert len(learn.grad_stats.df)==0

@pytest.mark.parametrize('name', ['0','0.1'], ids=['block','relu'])
@pytest.mark.parametrize('wrap', [in_place_compiled,forward_only])
def test_too_late_without_parameters(wrap, name):
    "A block or an activation owns no parameter: hooks that came too late are noticed all the same."
    net = lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU()), nn.Flatten(), nn.Linear(288,10))
    missing = overlooked(wrap, [name], net)
    learn = wrapped_learner(wrap, model=net)
    fit(learn)
    learn.add_cb(GradStatsCallback(modules=[learn.model.get_submodule(name)]))
    w = compile_warnings(lambda: fit(learn))
    if missing: assert len(w)==1 and repr(name) in w[0]
    else: assert w==[] and learn.grad_stats.select(kind='output').df['name'].nunique()==1
    torch._dynamo.reset()
    assert compile_warnings(lambda: fit(learn))==[]
    assert learn.grad_stats.select(kind='output').df['name'].nunique()==1

def test_compiled_between_fits():
    "Compiling a model that has been recorded is compiling it with no hook on it; the next fit puts them on before the first compiled call."
    learn,ref = wrapped_learner(cbs=[*both_callbacks(), (spy := GradSpy())]),wrapped_learner(cbs=both_callbacks())
    fit(learn); fit(ref)
    learn.model.compile(backend='eager')
    assert compile_warnings(lambda: fit(learn, 2))==[]
    fit(ref, 2)
    check_plain_run(learn, spy, ref)

def test_without_and_with_again():
    "Hooks that were compiled in may go and come: without the callback nothing is recorded, with a new one all of it."
    learn,ref = wrapped_learner(whole_model, both_callbacks()),wrapped_learner(cbs=both_callbacks())
    fit(learn); fit(ref)
    gcb,_ = take_ours_off(learn)
    n = len(gcb.df)
    fit(learn); fit(ref)
    assert len(gcb.df)==n
    learn.add_cbs([*both_callbacks(), (spy := GradSpy())])
    take_ours_off(ref)
    ref.add_cbs(both_callbacks())
    assert compile_warnings(lambda: fit(learn))==[]
    fit(ref)
    check_plain_run(learn, spy, ref)
    assert len(gcb.df)==n

def test_every_other_iteration():
    "Iterations that are not recorded run the same graph: nothing is compiled again after the first epoch."
    learn,ref = wrapped_learner(whole_model, [*both_callbacks(dict(every=2))], n=64),wrapped_learner(cbs=both_callbacks(dict(every=2)), n=64)
    fit(learn); fit(ref)
    frames = counters['frames']['total']
    fit(learn, 2); fit(ref, 2)
    assert counters['frames']['total']==frames
    a,b = (l.grad_stats.select(kind='output').df for l in (learn,ref))
    assert a['iteration'].unique().tolist()==[*range(0,12,2)]==b['iteration'].unique().tolist()
    np.testing.assert_allclose(a['norm'], b['norm'], rtol=1e-4)

def test_hooks_are_not_traced():
    "Our own code is not compiled, which would take seconds and dynamo's patience: 20 modules of one kind, and no limit is hit."
    def deep(): return nn.Sequential(nn.Flatten(), nn.Linear(192,10), *(nn.Linear(10,10) for _ in range(20)))
    config = torch._dynamo.config
    fails = 'fail_on_recompile_limit_hit' if hasattr(config, 'fail_on_recompile_limit_hit') else 'fail_on_cache_limit_hit'   # its name in torch 2.6
    with config.patch(fails, True): learn = fit(wrapped_learner(whole_model, both_callbacks(), deep))
    assert learn.grad_stats.select(kind='output').df['name'].nunique()==21

def test_frozen_body():
    "A compiled body that is frozen has no output gradients: no warning. Unfrozen, it has."
    def net(): return nn.Sequential(nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(288,10)))
    def body(m): m[0] = torch.compile(m[0], backend='eager'); return m
    learn,ref = wrapped_learner(body, both_callbacks(), net),wrapped_learner(cbs=both_callbacks(), model=net)
    for l in (learn,ref):
        for p in l.model[0].parameters(): p.requires_grad_(False)
    assert compile_warnings(lambda: fit(learn))==[]
    fit(ref)
    for l in (learn,ref):
        for p in l.model[0].parameters(): p.requires_grad_(True)
    w = compile_warnings(lambda: fit(learn))
    fit(ref)
    a,b = (l.grad_stats.select(kind='output').df for l in (learn,ref))
    assert w or a['name'].tolist()==b['name'].tolist()
    a,b = (l.grad_stats.select(kind='param').df for l in (learn,ref))
    np.testing.assert_allclose(a['norm'], b['norm'], rtol=1e-4)

def test_unused_modules_do_not_warn():
    "Plain modules that take no part in a forward are no sign of anything."
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = plain_convnet(),nn.Linear(3,3)
        def forward(self, x): return self.a(x)
    assert compile_warnings(lambda: fit(wrapped_learner(cbs=GradStatsCallback(include='^b'), model=Two)))==[]
    assert compile_warnings(lambda: fit(wrapped_learner(whole_model, GradStatsCallback(), Two)))==[]

@pytest.mark.parametrize('wrap', [whole_model,in_place_compiled])
def test_weights_read_by_a_parent(wrap):
    """A plain parent that uses a compiled child's weights and never calls it looks like code compiled too early: the warning names
    this case too, and all that ran is right."""
    class Reads(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(192,10),wrap(nn.Linear(192,10))
        def forward(self, x): x = x.flatten(1); return self.a(x)+F.linear(x, self.b.weight, self.b.bias)
    learn = wrapped_learner(cbs=[*both_callbacks(), (spy := GradSpy())], model=Reads)
    w = compile_warnings(lambda: fit(learn))
    assert len(w)==1 and "'b'" in w[0] and 'never calls them' in w[0]
    assert learn.grad_stats.select(kind='output').df['name'].unique().tolist()==['a']
    np.testing.assert_allclose(learn.grad_norm.norms, spy.norms, rtol=1e-5)

@pytest.mark.parametrize('wrap', [whole_model,aot_eager,in_place_compiled])
def test_params_only_changes_nothing(wrap):
    "Parameter-only recording under compile: the same losses and weights bit for bit, one graph, nothing warned."
    def go(cbs):
        torch._dynamo.reset(); counters.clear()
        learn = wrapped_learner(wrap, cbs)
        w = compile_warnings(lambda: fit(learn, 2))
        return [l.item() for l in learn.recorder.losses],[*learn.model.state_dict().values()],dict(counters['graph_break']),counters['stats']['unique_graphs'],w
    a,b = go(None),go(both_callbacks(dict(kind='param')))
    assert a[0]==b[0] and all(torch.equal(x, y) for x,y in zip(a[1], b[1]))
    assert a[2:]==b[2:] and b[2]=={} and b[4]==[]

def test_price_of_outputs():
    "Output hooks break the graph, at each recorded module; the model's numbers stay those of the compiled parts, here the same."
    def go(cbs):
        torch._dynamo.reset(); counters.clear()
        learn = fit(wrapped_learner(whole_model, cbs), 2)
        return [l.item() for l in learn.recorder.losses],sum(counters['graph_break'].values())
    (la,na),(lb,nb) = go(None),go(both_callbacks())
    assert na==0 and nb>0
    np.testing.assert_allclose(la, lb, rtol=1e-6)

def test_fullgraph():
    "fullgraph=True cannot be had with output hooks: torch raises, and its message names what to do. Parameters only: works."
    with pytest.raises(torch._dynamo.exc.Unsupported, match='kind=.param.'): fit(wrapped_learner(partial(whole_model, fullgraph=True), both_callbacks()))
    spy = GradSpy()
    learn = wrapped_learner(partial(whole_model, fullgraph=True), [*both_callbacks(dict(kind='param')), spy])
    ref = wrapped_learner(cbs=both_callbacks(dict(kind='param')))
    torch._dynamo.reset()
    fit(learn); fit(ref)
    check_plain_run(learn, spy, ref)

def test_first_nonfinite_under_compile():
    "A NaN made in forward is found between the same two modules."
    class Break(nn.Module):
        def forward(self, x): return x*torch.inf*0
    def net(): return nn.Sequential(nn.Conv2d(3,8,3), Break(), nn.Conv2d(8,4,3), nn.Flatten(), nn.Linear(64,10))
    a,b = (fit(wrapped_learner(w, both_callbacks(), net)).grad_stats.first_nonfinite() for w in (whole_model,noop))
    assert str(a)==str(b)

@pytest.mark.parametrize('wrap', (noop,in_place_compiled))
def test_hook_copies_and_pickles(wrap):
    "The hook that dynamo runs is replaced by a no-op in copies, as the other is."
    seen = []
    class Copy(Callback):
        order = 5
        def after_backward(self):
            f = io.BytesIO(); pickle.dump(self.model, f)
            seen.append((deepcopy(self.model), pickle.loads(f.getvalue()), b'gradstats' in f.getvalue()))
    learn = fit(wrapped_learner(wrap, [*both_callbacks(), Copy()]))
    n = len(learn.grad_stats.df)
    for *ms,named in seen:
        assert not named
        for m in ms: m(torch.randn(4,3,8,8)).sum().backward()
    assert len(learn.grad_stats.df)==n

@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a C++ compiler')
@pytest.mark.parametrize('wrap', [partial(whole_model, backend='inductor'), lambda m: (m.compile(), m)[1]], ids=['wrapped','in place'])
def test_inductor(wrap):
    learn,ref = wrapped_learner(wrap, [*both_callbacks(), (spy := GradSpy())]),wrapped_learner(cbs=both_callbacks())
    assert compile_warnings(lambda: fit(learn, 2))==[]
    fit(ref, 2)
    check_plain_run(learn, spy, ref)

@pytest.mark.slow
def test_resnet_compiled():
    from torchvision.models import resnet18
    net = partial(resnet18, num_classes=10)
    learn,ref = wrapped_learner(aot_eager, [*both_callbacks(), (spy := GradSpy())], net, n=16),wrapped_learner(cbs=both_callbacks(), model=net, n=16)
    assert compile_warnings(lambda: fit(learn))==[]
    fit(ref)
    check_plain_run(learn, spy, ref)
    assert learn.grad_stats.select(kind='output').df['name'].nunique()==41

# --- activation checkpointing

class Blocks(nn.Module):
    "Two blocks that may be checkpointed; the second calls one Linear twice"
    def __init__(self, reentrant=None, p=0.):
        super().__init__()
        self.stem = nn.Conv2d(3,4,3)
        self.a = nn.Sequential(nn.Conv2d(4,4,3), nn.ReLU(inplace=True), nn.Dropout(p))
        self.b = nn.Linear(64,64)
        self.drop = nn.Dropout(p)
        self.head = nn.Linear(64,10)
        self.reentrant = reentrant
    def twice(self, x): return self.b(self.drop(torch.tanh(self.b(x))))
    def forward(self, x):
        run = (lambda f,x: f(x)) if self.reentrant is None else partial(checkpoint, use_reentrant=self.reentrant)
        return self.head(run(self.twice, run(self.a, self.stem(x)).flatten(1)))

block_names = ['stem','a.0','b','head']

@pytest.mark.parametrize('p', (0., .3))
@pytest.mark.parametrize('reentrant', (False, True))
def test_checkpointing(reentrant, p):
    """Each tensor once, with the values of the run without checkpoints; `call` counts in order, except that a reentrant checkpoint
    counts in the order of its recomputation."""
    a = fit(wrapped_learner(cbs=[*both_callbacks(), Seed(), (spy := GradSpy())], model=partial(Blocks, reentrant, p)), 2)
    b = fit(wrapped_learner(cbs=[*both_callbacks(), Seed()], model=partial(Blocks, None, p)), 2)
    check_plain_run(a, spy, b)

@pytest.mark.parametrize('reentrant', (None, False, True))
def test_checkpointing_against_autograd(reentrant):
    "And those of autograd on the same batch."
    learn = wrapped_learner(cbs=both_callbacks(), model=partial(Blocks, reentrant))
    model,(x,y) = deepcopy(learn.model),first(learn.dls.train)
    model.reentrant = None
    want = output_grads(model, lambda m: F.cross_entropy(m(x), y), block_names)
    fit(learn)
    df = learn.grad_stats.select(kind='output').df
    df = df[df['iteration']==0]
    got = {(r['name'],r['out'],r['call']):r for _,r in df.iterrows()}
    assert len(df)==len(got)==len(want)==5 and set(got)==set(want)
    for k,g in want.items(): compare_row(got[k], g)

def shared_in_checkpoints(reentrant):
    "One module in two checkpoints, called once in each"
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.b,self.head = nn.Linear(192,192),nn.Linear(192,10)
        def forward(self, x):
            for _ in range(2): x = checkpoint(lambda x: torch.tanh(self.b(x)), x, use_reentrant=reentrant)
            return self.head(x)
    return nn.Sequential(nn.Flatten(), nn.Linear(192,192), Net())

@pytest.mark.parametrize('reentrant', (False, True))
def test_call_numbers_over_checkpoints(reentrant):
    "A reentrant checkpoint runs without gradients first and again in backward, last one first: `call` 0 is the last call. The other kind counts in order."
    learn = wrapped_learner(cbs=both_callbacks(), model=partial(shared_in_checkpoints, reentrant))
    model,(x,y) = deepcopy(learn.model),first(learn.dls.train)
    fit(learn)
    df = learn.grad_stats.select(kind='output').df
    df = df[(df['iteration']==0)&(df['name']=='2.b')]
    kept = []
    x = model[1](model[0](x))
    for _ in range(2):
        kept.append(model[2].b(x))
        x = torch.tanh(kept[-1])
    gs = torch.autograd.grad(F.cross_entropy(model[2].head(x), y), kept)
    assert sorted(df['call'])==[0,1]
    for _,r in df.iterrows(): compare_row(r, gs[1-r['call'] if reentrant else r['call']].double().numpy())

@pytest.mark.parametrize('reentrant', (False, True))
def test_checkpointing_changes_nothing(reentrant):
    "The same losses and weights, bit for bit, dropout in the recomputed part included."
    def go(cbs):
        learn = fit(wrapped_learner(cbs=cbs, model=partial(Blocks, reentrant, .3)), 2)
        return [l.item() for l in learn.recorder.losses],[*learn.model.state_dict().values()]
    (la,wa),(lb,wb) = go(None),go(both_callbacks())
    assert la==lb and all(torch.equal(x, y) for x,y in zip(wa, wb))

def test_checkpointed_nan_is_found():
    "Forward is seen twice under a checkpoint; the place where the NaN began is the same."
    class Break(nn.Module):
        def forward(self, x): return x*torch.inf*0
    def net(reentrant):
        m = Blocks(reentrant)
        m.a.insert(1, Break())
        return m
    got = [str(fit(wrapped_learner(cbs=both_callbacks(), model=partial(net, r))).grad_stats.first_nonfinite()) for r in (None,False)]
    assert got[0]==got[1]

# --- compiled before the callback came

class CompiledForward(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(6,8),nn.Linear(8,3)
    @torch.compile(backend='eager')
    def forward(self, x): return self.b(self.a(x).tanh())
class CompiledMethod(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(6,8),nn.Linear(8,3); self.f = torch.compile(self._f, backend='eager')
    def _f(self, x): return self.b(self.a(x).tanh())
    def forward(self, x): return self.f(x)
class CompiledPart(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(6,8),nn.Linear(8,3)
    @torch.compile(backend='eager')
    def part(self, x): return self.a(x)
    def forward(self, x): return self.b(self.part(x).tanh())
@torch.compile(backend='eager')
def compiled_outside(m, x): return m.b(m.a(x).tanh())
class CompiledFunction(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(6,8),nn.Linear(8,3)
    def forward(self, x): return compiled_outside(self, x)

@pytest.mark.parametrize('cls', (CompiledForward,CompiledMethod,CompiledPart,CompiledFunction))
def test_compiled_code(cls):
    "Compiled before the callback came: the promised warning once a fit, and its remedy works."
    learn = fit(vector_learner(cls))
    def said():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            fit(learn, 2, cbs=(gcb := GradStatsCallback()))
        texts = [str(w.message) for w in caught if 'fastai_gradstats' in w.filename]
        return gcb,texts
    gcb,texts = said()
    assert len(texts)==1 and 'torch._dynamo.reset' in texts[0] and "'a'" in texts[0]
    assert set(gcb.select(kind='output').df['name'])<=({'b'} if cls is CompiledPart else set())
