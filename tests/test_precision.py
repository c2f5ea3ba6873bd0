"Half precision and gradient scalers, whoever takes the scale off; on a CPU, whose scaler scales and skips as CUDA's does."
import numpy as np,pytest,torch
from copy import deepcopy
from fastai.basics import *
from fastai.callback.fp16 import NonNativeMixedPrecision,get_master,_copy_state
from fastai.callback.training import GradientAccumulation,GradientClip
from torch import nn
from helpers.callbacks import CPUAmp,Dropper,Overflow,leave_gradients,total_norm
from helpers.oracles import GradSpy,OptimizerTruth,compare_row
from helpers.training import both_callbacks,fit,image_data,image_learner,linear_classifier,loaders,seeded_mlp,small_linear,step_learner,vector_batches

# --- fastai's MixedPrecision

def test_scale_is_removed():
    "A scale that is a power of two, and grows and backs off, changes no number of either kind."
    a = fit(image_learner(cbs=[*both_callbacks(), CPUAmp(init_scale=2.**16, growth_interval=2)]))
    b = fit(image_learner(cbs=both_callbacks()))
    for f in ('grad_stats','grad_norm'):
        for c in (da := getattr(a, f).df): np.testing.assert_array_equal(da[c], getattr(b, f).df[c], err_msg=c)

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_autocast(dtype):
    spy = GradSpy()
    learn = fit(image_learner(linear_classifier, [*both_callbacks(), CPUAmp(dtype, init_scale=1024.), spy], bs=16, n=16))
    x,y = first(learn.dls.train)
    set_seed(0)
    image_data()
    model = linear_classifier()
    with torch.autocast('cpu', dtype):
        out = model(x)
        loss = nn.CrossEntropyLoss()(out.float(), y)
    g, = torch.autograd.grad(loss*1024, out)   # in half precision, scaled: as backward saw it
    compare_row(learn.grad_stats.select(kind='output').df.iloc[0], g.double().numpy()/1024)

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_parameters_under_autocast(dtype):
    "Scaled gradients of half precision, divided by the scale: rows and norms are autograd's over 1024."
    learn = image_learner(linear_classifier, [*both_callbacks(), CPUAmp(dtype, init_scale=1024.)], n=16)
    model,(x,y) = deepcopy(learn.model),first(learn.dls.train)
    with torch.autocast('cpu', dtype): out = model(x)
    gs = [g.double().numpy()/1024 for g in torch.autograd.grad(nn.CrossEntropyLoss()(out.float(), y)*1024, list(model.parameters()))]
    fit(learn)
    for r,g in zip(learn.grad_stats.select(kind='param').df.to_dict('records'), gs, strict=True): compare_row(r, g)
    np.testing.assert_allclose(learn.grad_norm.norms, [np.sqrt(sum((g**2).sum() for g in gs))], rtol=1e-5)

def test_overflow():
    "An overflow is a skipped step: its rows are there, not finite and marked; the scale of the next step is another."
    learn = fit(image_learner(linear_classifier, [*both_callbacks(), CPUAmp(init_scale=2.**16), Overflow([1])]))
    d,s = learn.grad_stats.df,learn.grad_norm.df
    assert s['skipped'].tolist()==[False,True,False,False] and s['step'].tolist()==[0,1,2,3]
    assert d.loc[d['skipped'],'iteration'].unique().tolist()==[1]
    assert (d.loc[d['iteration']==1,'nonfinite']==d.loc[d['iteration']==1,'numel']).all()
    assert (d.loc[d['iteration']!=1,'nonfinite']==0).all()
    assert s['nonfinite'].tolist()==[0,1930,0,0] and not np.isfinite(s['norm'][1])
    plain = fit(image_learner(linear_classifier, [*both_callbacks(), Overflow([])])).grad_stats.df
    np.testing.assert_array_equal(d[d['iteration']==0]['max_abs'], plain[plain['iteration']==0]['max_abs'])
    assert np.isfinite(learn.grad_norm.df['norm'][2])

def test_overflow_of_an_accumulated_step():
    learn = fit(image_learner(linear_classifier, [*both_callbacks(), CPUAmp(init_scale=2.**16), GradientAccumulation(32), Overflow([1])], n=128))
    d = learn.grad_stats.select(kind='output').df
    assert d['step'].tolist()==[0,0,1,1,2,2,3,3]
    assert d['skipped'].tolist()==[True]*2+[False]*6

@pytest.mark.parametrize('dtype', (torch.float16,torch.bfloat16))
def test_clipping_in_half_precision(dtype):
    "torch's own norm overflows or is rough there: what is recorded is what came out of it"
    learn = step_learner([*both_callbacks(), GradientClip(1.)], model=seeded_mlp().to(dtype),
                         dls=loaders(torch.randn(32,6).to(dtype), torch.arange(32)%3, 8),
                         loss=lambda o,y: F.cross_entropy(o.float(), y)*5e4, lr=1e-6)
    truth = OptimizerTruth(learn)
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.df['clipped_norm'], truth.norms, rtol=1e-5)

# --- a scale that somebody else takes off

class OwnScaler(Learner):
    "A loop that hands the step to the scaler, which takes the scale off inside"
    def _do_one_batch(self):
        self.pred = self.model(*self.xb)
        self.loss = self.loss_grad = self.loss_func(self.pred, *self.yb)
        if not self.training: return
        self('before_backward')
        self.scaler.scale(self.loss_grad).backward()
        self('after_backward')
        self._with_events(self._step, 'step', CancelStepException)
        self.opt.zero_grad()
    def _step(self):
        if self.unscale: self.scaler.unscale_(self.opt)
        self.scaler.step(self.opt)
        self.scaler.update()

@pytest.mark.parametrize('opt', (torch.optim.SGD, partial(torch.optim.SGD, fused=True), partial(torch.optim.AdamW, fused=True)),
                         ids=('sgd','fused sgd','fused adamw'))
@pytest.mark.parametrize('unscale', (False, True))
def test_scaler_in_a_loop_of_ones_own(opt, unscale):
    "The same norms as without a scale"
    want = step_learner(both_callbacks(), opt_func=partial(OptimWrapper, opt=opt))
    fit(want)
    learn = step_learner(both_callbacks(), cls=OwnScaler, opt_func=partial(OptimWrapper, opt=opt))
    learn.unscale,learn.scaler = unscale,torch.amp.GradScaler('cpu', init_scale=1024.)
    fit(learn)
    for c in ('norm','clipped_norm'): np.testing.assert_allclose(learn.grad_norm.df[c], want.grad_norm.df[c], rtol=1e-5)
    np.testing.assert_allclose(learn.grad_stats.df['norm'], want.grad_stats.df['norm'], rtol=1e-5)

@pytest.mark.parametrize('scaler', (object(), 'a text', None, torch.amp.GradScaler('cpu', enabled=False)), ids=('object','text','none','disabled'))
def test_scaler_that_is_none(scaler):
    "Whatever `learn.scaler` is; and a step that is cancelled beside it"
    learn = step_learner([*both_callbacks(), Dropper('before_step', CancelStepException, leave_gradients, 0)], model=small_linear(),
                         dls=vector_batches(scale={1:1000}))
    learn.scaler = scaler
    fit(learn)
    assert learn.grad_norm.df['skipped'].tolist()==[False,True,False,False]

def test_scaler_left_behind_by_an_interrupt():
    "Ctrl-C in fp16, then `to_fp32`: nobody scales any more, though the scaler is there"
    class CtrlC(Callback):
        def after_batch(self):
            if self.iter==2: raise KeyboardInterrupt
    amp,ctrl_c = CPUAmp(torch.bfloat16),CtrlC()
    amp.before_fit = lambda: None
    learn = step_learner([*both_callbacks(), amp, ctrl_c])
    amp.autocast = torch.autocast('cpu', torch.bfloat16)
    learn.scaler,amp.scales = torch.amp.GradScaler('cpu', init_scale=2.**16),L()
    with pytest.raises(KeyboardInterrupt): fit(learn)
    learn.remove_cbs([amp, ctrl_c])
    assert learn.scaler.is_enabled()
    truth = OptimizerTruth(learn)
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.select(fit=1).steps['norm'], truth.norms, rtol=1e-5)

# --- float32 copies of the weights

class CPUMaster(NonNativeMixedPrecision):
    "fastai's `to_non_native_fp16`, without its check for CUDA"
    def before_fit(self):
        self.model_pgs,self.master_pgs = get_master(self.opt, self.flat_master)
        self.old_pgs = self.opt.param_lists
        _copy_state(self.learn.opt, self.model_pgs, self.master_pgs)
        self.count = 0

def half_data(n=4): return loaders(torch.randn(n*8,6, generator=torch.Generator().manual_seed(0)).half(), torch.arange(n*8)%3, 8)

@pytest.mark.parametrize('flat', (False, True))
@pytest.mark.parametrize('clip', (None, .1))
def test_float32_copies(flat, clip):
    "Rows and norms without the loss scale, the norm before that callback clips, and what the copies got after it"
    kwargs = dict(loss=lambda o,y: F.cross_entropy(o.float(), y), lr=1e-3)
    want = step_learner(both_callbacks(), model=seeded_mlp().half(), dls=half_data(), **kwargs)
    fit(want)
    amp = CPUMaster(dynamic=False, loss_scale=512, flat_master=flat, clip=clip)
    learn = step_learner([*both_callbacks(), amp], model=seeded_mlp().half(), dls=half_data(), **kwargs)
    learn.create_opt()
    got,step = [],learn.opt.step
    def f():
        got.append(total_norm(p.grad for ps in learn.opt.param_lists for p in ps))
        step()
    learn.opt.step = f
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.df['norm'], want.grad_norm.df['norm'], rtol=5e-3)
    np.testing.assert_allclose(learn.grad_stats.df['norm'], want.grad_stats.df['norm'], rtol=2e-2)
    np.testing.assert_allclose(learn.grad_norm.df['clipped_norm'], got, rtol=1e-5)
    assert learn.grad_norm.by('group')['group'].unique().tolist()==[0]

def test_float32_copies_overflow():
    "The dynamic scale begins too large: dropped batches are skipped steps"
    amp = CPUMaster(dynamic=True, max_loss_scale=2.**24)
    learn = step_learner([*both_callbacks(), amp], model=seeded_mlp().half(), dls=half_data(12), loss=lambda o,y: F.cross_entropy(o.float(), y), lr=1e-3)
    learn.create_opt()
    fit(learn)
    d = learn.grad_norm.df
    assert len(d)==12 and d['skipped'].tolist()==(~np.isfinite(d['norm'])).tolist() and 0<d['skipped'].sum()<12
    assert (d.loc[d['skipped'],'nonfinite']>0).all()
