"Rows of the page \"When is a number right?\" that no other file shows."
import io
from contextlib import redirect_stdout

import matplotlib.pyplot as plt
import numpy as np,pytest,torch
import torch.nn.functional as F
from fastai.basics import *
from torch import nn

from fastai_gradstats import GradNormCallback,GradStatsCallback,plot_grad_flow,plot_grad_heatmap,plot_grad_log10,plot_grad_norm
from oracles import ByRows,Spy,TrainOnly,check_params,compare,fit,loaders,output_grads
from test_learners import tabular
from test_models import Grad,_Inject
from test_training import Branch,CPUAmp,both,learner,linear

del test,test_close,test_eq,test_eq_type,test_fail,test_fig_exists,test_is,test_ne,test_set,test_shuffled,test_sig,test_stdout,test_warns   # fastcore's, which fastai exports and pytest would collect

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_parameters_under_autocast(dtype):
    "Scaled gradients of half precision, divided by the scale: rows and norms are autograd's over 1024."
    learn = learner(linear, [*both(), CPUAmp(dtype, init_scale=1024.)], n=16)
    model,(x,y) = deepcopy(learn.model),first(learn.dls.train)
    with torch.autocast('cpu', dtype): out = model(x)
    gs = [g.double().numpy()/1024 for g in torch.autograd.grad(nn.CrossEntropyLoss()(out.float(), y)*1024, list(model.parameters()))]
    fit(learn)
    for r,g in zip(learn.grad_stats.select(kind='param').df.to_dict('records'), gs, strict=True): compare(r, g)
    np.testing.assert_allclose(learn.grad_norm.norms, [np.sqrt(sum((g**2).sum() for g in gs))], rtol=1e-5)

class Fails(nn.Module):
    "Passes its input on; an ordinary exception in forward or backward when told to"
    where = None
    def forward(self, x):
        if self.where=='forward': self.boom()
        if self.where=='backward': x.register_hook(self.boom)
        return x
    def boom(self, *args): raise RuntimeError('test')

class FailsToo(Callback):
    def after_loss(self): raise RuntimeError('test')

@pytest.mark.parametrize('where', ('forward','backward','optimizer','callback'))
def test_exception(where):
    "An ordinary exception in the second fit: what was recorded stays as it was, no hook acts or stays, and the next fit is recorded."
    learn = learner(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192,20), Fails(), nn.Linear(20,10)), both())
    fit(learn)
    before = learn.grad_stats.df,learn.grad_norm.df
    def boom(*args): raise RuntimeError('test')
    if where=='optimizer': learn.opt.step = boom
    elif where!='callback': learn.model[2].where = where
    with pytest.raises(RuntimeError, match='test'): fit(learn, cbs=FailsToo() if where=='callback' else None)
    learn.model[2].where = None
    learn.opt.__dict__.pop('step', None)
    assert not any(m._forward_hooks for m in learn.model.modules())
    learn.model(torch.randn(4,3,8,8)).sum().backward()
    learn.opt.zero_grad()
    for f,d in zip(('grad_stats','grad_norm'), before): pd.testing.assert_frame_equal(getattr(learn, f).df[:len(d)].astype({'fit':int}), d.astype({'fit':int}), check_categorical=False)
    assert len(learn.grad_stats.df)-len(before[0])==(2 if where=='optimizer' else 0)   # its backward was complete
    spy = Spy()
    fit(learn, cbs=spy)
    np.testing.assert_allclose(learn.grad_norm.norms[4:], spy.norms, rtol=1e-5)

def test_show_results():
    "A learner that can decode: `predict`, `show_results`, `summary` leave the record alone."
    learn = fit(tabular(cbs=both()))
    n = len(learn.grad_stats.df),len(learn.grad_norm.df)
    with learn.no_bar(), redirect_stdout(io.StringIO()):
        learn.show_results(max_n=2)
        learn.predict(learn.dls.train_ds.items.iloc[0])
        learn.summary()
    assert (len(learn.grad_stats.df),len(learn.grad_norm.df))==n
    assert not any(m._forward_hooks for m in learn.model.modules())

class TwoLosses(Learner):
    "Two backwards before each step"
    def _backward(self):
        self.loss_grad.backward(retain_graph=True)
        (self.pred.square().mean()).backward()

def test_two_losses():
    "Two backwards through the same outputs: a row for each, in that order; parameters have one row, the sum."
    learn = learner(linear, [*both(), (spy := Spy())], cls=TwoLosses, n=16)
    model,(x,y) = deepcopy(learn.model),first(learn.dls.train)
    fit(learn)
    want = [output_grads(model, f, ['1'])['1',0,0] for f in (lambda m: F.cross_entropy(m(x), y), lambda m: m(x).square().mean())]
    for r,g in zip(learn.grad_stats.select(kind='output').df.to_dict('records'), want, strict=True): compare(r, g)
    check_params(learn.grad_stats.df, spy, learn.grad_norm.norms)

class TwoSteps(Learner):
    "Backward and step twice for each batch"
    def _do_one_batch(self):
        super()._do_one_batch()
        if not self.training: return
        self.pred = self.model(*self.xb)
        self.loss_grad = self.loss = self.loss_func(self.pred, *self.yb)
        self._do_grad_opt()

def test_two_steps_in_a_batch():
    "Each step has a number and rows of its own, in the batch's iteration; the second forward is another `call`."
    learn = fit(learner(linear, [*both(), (spy := Spy())], cls=TwoSteps))
    d,s = learn.grad_stats.df,learn.grad_norm.df
    for n in spy.grads[0]:
        rows = d[d['name']==n].to_dict('records')
        for r,gs in zip(rows, spy.grads, strict=True): compare(r, gs[n])
        assert [r['step'] for r in rows]==s['step'].tolist()==[*range(8)]
        assert [r['iteration'] for r in rows]==s['iteration'].tolist()==[0,0,1,1,2,2,3,3]
    for norms in s['norm'],learn.grad_norm.by('module')['norm']: np.testing.assert_allclose(norms, spy.norms, rtol=1e-5)
    out = d[d['kind']=='output']
    assert out['call'].tolist()==[0,1]*4 and out['step'].tolist()==[*range(8)]

@pytest.mark.parametrize('kind', ('skipped','cancelled'))
def test_one_of_two_steps_in_a_batch(kind):
    "The second step overflows, or its backward is cancelled: the first keeps its rows, and is not marked."
    class Second(TwoSteps):
        def _do_grad_opt(self):
            self.n = getattr(self, 'n', -1)+1
            if self.n%2 and kind=='skipped': self.loss_grad = self.loss_grad*torch.inf
            super()._do_grad_opt()
    class Cancel(Callback):
        order = 5
        def before_backward(self):
            if self.learn.n%2: raise CancelBackwardException('test')
    learn = fit(learner(linear, [*both(), CPUAmp(init_scale=1024.) if kind=='skipped' else Cancel()], cls=Second, n=32))
    s,d = learn.grad_norm.df,learn.grad_stats.df
    if kind=='skipped': assert s['skipped'].tolist()==[False,True]*2 and d.groupby('step')['skipped'].agg(['min','max']).values.tolist()==[[False]*2,[True]*2]*2
    else: assert not d['skipped'].any() and d[d['kind']=='output']['call'].tolist()==[0,0]

def test_unused_parameters_of_torch_optimizers():
    "torch's optimizers set gradients to None: a parameter that is not used this step has no row."
    learn = fit(learner(Branch, both(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD)))
    d = learn.grad_stats.df
    for n,its in (('a.weight',[0,2]), ('b.weight',[1,3])): assert d.loc[d['name']==n,'iteration'].tolist()==its

@pytest.mark.parametrize('cls', (GradStatsCallback,ByRows))
@pytest.mark.parametrize('n', (3, 5000, 300_000))
@pytest.mark.parametrize('v', (1e300, 1e40, -1e40, 1e-60, -1e-300))
def test_beyond_float32(v, n, cls):
    "Numbers in float64 that float32 has not: 0 or inf in the float columns (`std` may be NaN where squares leave float64), counts are exact."
    x = (torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))+1)*v
    cb,norm = cls(),GradNormCallback()
    fit(Learner(loaders(torch.zeros(2,1), torch.zeros(2)), Grad(x), loss_func=lambda o,y: _Inject.apply(o, x), opt_func=SGD, lr=0., cbs=[cb,norm,TrainOnly()]))
    df,reads = cb.df,np.inf if abs(v)>1 else 0
    assert df['kind'].tolist()==['output','param'] and (df[['max_abs','mean_abs','norm']].to_numpy()==reads).all() and (df['mean']==np.sign(v)*reads).all()
    assert (df['std']==0).all() if reads==0 else not np.isfinite(df['std']).any()
    assert (df[['numel','zeros','nonfinite','above']].to_numpy()==[n, 0, 0, n if reads else 0]).all()
    np.testing.assert_allclose(norm.norms, [reads if '300' in f'{v}' else np.linalg.norm(x.numpy())], rtol=1e-5)   # sums of squares, in float64

def test_plots_of_extremes():
    "Every plot draws a record that holds the smallest and the largest number, zeros, inf and NaN."
    class Scale(Callback):
        order = 5
        def before_backward(self): self.learn.loss_grad = self.loss_grad*[1e-38, 1e36, 0., torch.inf, torch.nan, 1.][self.iter]
    with np.errstate(all='raise'): learn = fit(learner(cbs=[*both(), Scale()], n=96, cls=NoStep))
    m = learn.grad_norm.df['norm'].tolist()
    assert 0<m[0]<1e-35 and m[1]>1e34 and m[2]==0 and not np.isfinite(m[3:5]).any() and np.isfinite(m[5])
    for f in (plot_grad_log10, plot_grad_heatmap, plot_grad_norm, *(partial(plot_grad_flow, iteration=i) for i in range(6))):
        ax = f(learn)
        ax.figure.canvas.draw()
        plt.close('all')

class NoStep(Learner):
    "Weights stay as they are, whatever their gradients"
    def _step(self): pass

class Mapped(nn.Module):
    "Runs one module inside a transform of `torch.func`"
    def __init__(self, how): super().__init__(); self.l,self.head,self.how = nn.Linear(6,6),nn.Linear(6,3),how
    def forward(self, x): return self.head(self.how(self.l, x))

def batched(l, x):
    "All rows of the Jacobian in one backward"
    x = x.detach().requires_grad_()
    y = l(x)
    return y+torch.autograd.grad(y, x, torch.eye(6)[:,None].expand(6,*y.shape), is_grads_batched=True, create_graph=True)[0].sum(0)

@pytest.mark.parametrize('how', (batched, lambda l,x: torch.func.vmap(l)(x), lambda l,x: torch.func.vmap(torch.func.jacrev(l))(x).sum(1), lambda l,x: l(x)+torch.func.grad(lambda x: l(x).square().sum())(x)), ids=('batched','vmap','jacrev','penalty'))
def test_inside_torch_func(how):
    "Its output is the transform's; parameters, norms and other modules are as ever, and it is said once"
    cbs,spy,x,y = both(),Spy(),torch.randn(8,6),torch.randint(3, (8,))
    learn = Learner(loaders(x, y, 4), Mapped(how), loss_func=F.cross_entropy, cbs=[*cbs,spy,TrainOnly()])
    with pytest.warns(UserWarning, match="'l' ran inside a transform") as w: fit(learn)
    assert sum('transform' in str(o.message) for o in w)==1
    df = learn.grad_stats.df
    check_params(df, spy, learn.grad_norm.norms)
    out = df[df['kind']=='output']
    assert {'head'}<=set(out['name'])<={'l','head'} and (out['call']==0).all()

def test_traced_in_forward():
    "A trace runs the modules once more, with sizes that are tensors"
    class Traces(nn.Module):
        def __init__(self): super().__init__(); self.l,self.head = nn.Linear(6,6),nn.Linear(6,3)
        def forward(self, x):
            if not torch.jit.is_tracing(): torch.jit.trace(self.l, x, check_trace=False)
            return self.head(self.l(x))
    cbs,spy = both(),Spy()
    learn = fit(Learner(loaders(torch.randn(8,6), torch.randint(3, (8,)), 4), Traces(), loss_func=F.cross_entropy, cbs=[*cbs,spy,TrainOnly()]))
    df = learn.grad_stats.df
    check_params(df, spy, learn.grad_norm.norms)
    assert df[df['kind']=='output'][['iteration','name','call']].values.tolist()==[[i,n,0] for i in (0,1) for n in ('l','head')]
