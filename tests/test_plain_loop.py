"`GradRecorder` in a plain loop: the callbacks' numbers, and what a loop may do."
import pickle,warnings
import numpy as np,pandas as pd,pytest,torch
from fastai.basics import *
from fastai.callback.all import *
from torch import nn
from torch.nn.modules.module import _global_forward_hooks
from fastai_gradstats import GradRecorder,diagnose,save_report
from helpers.callbacks import TrainOnly
from helpers.training import both_callbacks,fit,image_data,dropout_convnet,same_values,seeded_mlp

def optim_wrapper_sgd(params, lr, **kwargs): return OptimWrapper(params, torch.optim.SGD, lr=lr)

def learner_frames(cbs=(), epochs=2, **kw):
    "What the callbacks record"
    set_seed(0)
    learn = Learner(image_data(**kw), dropout_convnet(), loss_func=nn.CrossEntropyLoss(), opt_func=optim_wrapper_sgd, lr=.01, cbs=[*both_callbacks(norm=dict(update_every=2)), *cbs, TrainOnly()])
    torch.manual_seed(7)
    fit(learn, epochs)
    return learn.grad_stats.df,learn.grad_norm.df,learn.grad_norm.by('param'),learn.model

def one_step(rec, model, opt, loss, number):
    loss.backward()
    opt.step()
    opt.zero_grad()

def plain_training(step=one_step, recorder=GradRecorder, epochs=2, scaler=None, **kw):
    "The same in a plain loop"
    set_seed(0)
    dls,model = image_data(**kw),dropout_convnet()
    opt = torch.optim.SGD(model.parameters(), lr=.01)
    losses,rec = [],recorder(model, opt, update_every=2, scaler=scaler)
    torch.manual_seed(7)
    with rec:
        for epoch in range(epochs):
            rec.epoch = epoch
            model.train()
            for number,(xb,yb) in enumerate(dls.train):
                loss = F.cross_entropy(model(xb), yb)
                rec.loss(loss)
                losses.append(loss.detach())
                step(rec, model, opt, loss, number)
    return rec,[*losses, *model.state_dict().values()]

class NoRecorder:
    "The bare loop"
    def __init__(self, *args, **kwargs): pass
    def __enter__(self): return self
    def __exit__(self, *args): pass
    def loss(self, loss): pass
    def read(self): pass

def assert_same_frames(rec, tensors, steps, params):
    "Row for row: counts to the bit, floats to 1e-6 of their size"
    for got,want in ((rec.df,tensors), (rec.steps,steps), (rec.by('param'),params)):
        exact = [c for c in want if want[c].dtype.kind!='f']
        pd.testing.assert_frame_equal(got[exact], want[exact], check_categorical=False)
        pd.testing.assert_frame_equal(got, want, rtol=1e-6, atol=1e-9, check_categorical=False)

def clipped(rec, model, opt, loss, number):
    loss.backward()
    rec.read()
    nn.utils.clip_grad_norm_(model.parameters(), .5)
    opt.step()
    opt.zero_grad()

def accumulated(rec, model, opt, loss, number):
    (loss/2).backward()
    if number%2:
        opt.step()
        opt.zero_grad()

class Accumulates(Callback):
    "Two batches a step, the loss halved"
    order = MixedPrecision.order-4
    def after_loss(self): self.learn.loss_grad = self.loss_grad/2
    def before_step(self):
        if self.iter%2==0: raise CancelBatchException('not yet')

@pytest.mark.parametrize('step,cbs', ((one_step, lambda: []), (clipped, lambda: [GradientClip(.5)]), (accumulated, lambda: [Accumulates()])), ids='plain clipped accumulated'.split())
def test_the_callbacks_numbers(step, cbs):
    *frames,model = learner_frames(cbs())
    rec,_ = plain_training(step)
    assert_same_frames(rec, *frames)
    assert all(torch.equal(a, b) for a,b in zip(rec.loop.model.state_dict().values(), model.state_dict().values()))

@pytest.mark.parametrize('step', (one_step, clipped, accumulated))
def test_the_same_training(step):
    "Losses and weights, bit for bit, with and without; no hook is left"
    _,got = plain_training(step)
    _,want = plain_training(step, NoRecorder)
    assert same_values(got, want)
    assert not _global_forward_hooks

def with_scaler(scaler, broken=()):
    def step(rec, model, opt, loss, number):
        scaler.scale(loss*(torch.inf if number in broken else 1)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    return step

def test_amp():
    "The scale is off outputs and parameters, and an overflow is a skipped step with its rows"
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10)
    rec,_ = plain_training(with_scaler(scaler, broken=[1]), scaler=scaler, epochs=1)
    plain,_ = plain_training(epochs=1)
    assert rec.steps['skipped'].tolist()==[False,True,False,False] and not np.isfinite(rec.steps['norm'][1])
    first = [d[d['iteration']==0].reset_index(drop=True) for d in (rec.df,plain.df)]
    pd.testing.assert_frame_equal(*first, rtol=1e-6, atol=1e-9)
    assert rec.df.loc[rec.df['iteration']==1,'skipped'].all() and not rec.df.loc[rec.df['iteration']!=1,'skipped'].any()
    assert 'step' not in scaler.__dict__

def test_unscaled_and_clipped_by_hand():
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10)
    norms = []
    def step(rec, model, opt, loss, number):
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        rec.read()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), .3).item())
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    rec,_ = plain_training(step, scaler=scaler, epochs=1)
    np.testing.assert_allclose(rec.norms, norms, rtol=1e-6)
    np.testing.assert_allclose(rec.steps['clipped_norm'], .3, rtol=1e-4)

class FusedLike(torch.optim.SGD):
    "An optimizer that takes the scale off and skips by itself, as fused ones do on a GPU"
    _step_supports_amp_scaling = True
    @torch.no_grad()
    def step(self, closure=None):
        if self.found_inf is not None and self.found_inf>0: return
        for group in self.param_groups:
            for p in group['params']: p.sub_(group['lr']*p.grad/self.grad_scale)

def test_a_fused_optimizer_skips_by_itself():
    torch.manual_seed(0)
    model,x = nn.Linear(4,1),torch.ones(8,4)
    opt,scaler = FusedLike(model.parameters(), lr=.1),torch.amp.GradScaler('cpu', init_scale=4.)
    want = []
    with GradRecorder(model, opt, scaler=scaler) as rec:
        for bad in (1,torch.inf,1):
            loss = model(x).mean()*bad
            want.append(nn.utils.get_total_norm(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)).item())
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    assert rec.steps['skipped'].tolist()==[False,True,False]
    assert rec.df.groupby('iteration')['skipped'].all().tolist()==[False,True,False]
    np.testing.assert_allclose(np.array(rec.norms)[[0,2]], np.array(want)[[0,2]], rtol=1e-6)

# --- what a loop may do

def mlp_recorder(make_opt=lambda ps: torch.optim.SGD(ps, lr=.1), **kw):
    model = seeded_mlp()
    opt = make_opt(model.parameters())
    x,y = torch.randn(8,6, generator=torch.Generator().manual_seed(1)),torch.arange(8)%3
    return model,opt,GradRecorder(model, opt, **kw),lambda: F.cross_entropy(model(x), y)

def norm_of(model): return nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
def total(loss, model): return nn.utils.get_total_norm(torch.autograd.grad(loss, list(model.parameters()))).item()

@pytest.mark.parametrize('kind', ('both','param'))
@pytest.mark.parametrize('reads', (False,True))
def test_lbfgs(reads, kind):
    "One step, one iteration: the first evaluation, at the weights from which the step starts, with its loss; whatever the closure calls again"
    model,opt,rec,loss = mlp_recorder(lambda ps: torch.optim.LBFGS(ps, max_iter=4), kind=kind)
    def closure():
        opt.zero_grad()
        l = rec.loss(loss())
        l.backward()
        if reads: rec.read()
        return l
    want,losses = [],[]
    with rec:
        for _ in range(3):
            want.append(total(loss(), model))
            losses.append(loss().item())
            opt.step(closure)
    np.testing.assert_allclose(rec.norms, want, rtol=1e-6)
    np.testing.assert_allclose(rec.steps['loss'], losses, rtol=1e-6)
    params = rec.df[rec.df['kind']=='param']
    assert params.groupby('step').size().tolist()==[4,4,4]

class SAM(torch.optim.Optimizer):
    "Two backwards a step; the weights come back inside `second_step`"
    def __init__(self, params, base, rho=.05, **kw):
        super().__init__(params, dict(rho=rho, **kw))
        self.base = base(self.param_groups, **kw)
    @torch.no_grad()
    def first_step(self):
        norm = nn.utils.get_total_norm([p.grad for g in self.param_groups for p in g['params']])
        for g in self.param_groups:
            for p in g['params']:
                self.state[p]['old'] = p.detach().clone()
                p.add_(p.grad*g['rho']/norm)
        self.zero_grad()
    @torch.no_grad()
    def second_step(self):
        for g in self.param_groups:
            for p in g['params']: p.copy_(self.state[p]['old'])
        self.base.step()
        self.zero_grad()
    def step(self, closure=None): raise NotImplementedError

def test_sam():
    "The optimizer inside steps once for two backwards: two iterations, one step, with the gradient that it used"
    model = seeded_mlp()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=.1)
    x,y = torch.randn(8,6),torch.arange(8)%3
    want = []
    with GradRecorder(model, opt.base) as rec:
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
            opt.first_step()
            F.cross_entropy(model(x), y).backward()
            want.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
            opt.second_step()
    np.testing.assert_allclose(rec.norms, want, rtol=1e-6)
    assert rec.df[rec.df['kind']=='output'].groupby('iteration').size().tolist()==[2]*6

def test_two_optimizers():
    "Each step has the gradients of its own optimizer's parameters"
    model = seeded_mlp()
    opts = [torch.optim.SGD(model[i].parameters(), lr=lr) for i,lr in ((0,.1),(2,.2))]
    x,y = torch.randn(8,6),torch.arange(8)%3
    want = []
    with GradRecorder(model, opts) as rec:
        for _ in range(2):
            F.cross_entropy(model(x), y).backward()
            for i,opt in zip((0,2), opts):
                want.append(nn.utils.get_total_norm([p.grad for p in model[i].parameters()]).item())
                opt.step()
            for opt in opts: opt.zero_grad()
    np.testing.assert_allclose(rec.norms, want, rtol=1e-6)
    assert rec.steps['lr'].tolist()==[.1,.2]*2 and rec.steps['iteration'].tolist()==[0,0,1,1]
    assert rec.by('param').groupby('step')['name'].apply(list).tolist()==[['0.weight','0.bias'],['2.weight','2.bias']]*2

def put_in_group(opt, model): opt.param_groups[0]['params'] = list(model.parameters())
def added_group(opt, model): opt.add_param_group(dict(params=list(model[2].parameters())))

@pytest.mark.parametrize('tell', [put_in_group, added_group])
def test_a_layer_exchanged_in_mid_loop(tell):
    "Its rows, and norms with it, from its first step on"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3,4), nn.Tanh(), nn.Linear(4,2))
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    want = []
    with GradRecorder(model, opt) as rec:
        for step in range(6):
            if step==3:
                model[2] = nn.Linear(4,2)
                tell(opt, model)
            model(torch.randn(5,3)).square().sum().backward()
            want.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
            opt.step()
            model.zero_grad()
            opt.zero_grad()
    np.testing.assert_allclose(rec.steps['norm'], want, rtol=1e-5)
    assert rec.df.query("kind=='output' and name=='2'")['iteration'].tolist()==list(range(6))
    assert rec.df.query("kind=='param' and name=='2.weight'")['iteration'].tolist()==list(range(6))

def test_two_backwards_of_one_forward():
    "Each backward is an iteration"
    model,opt,rec,loss = mlp_recorder()
    with rec:
        l = loss()
        l.backward(retain_graph=True)
        (2*l).backward()
        opt.step()
    out = rec.df[rec.df['kind']=='output']
    assert out.groupby('iteration').size().tolist()==[2,2] and rec.steps['iteration'].tolist()==[1]
    np.testing.assert_allclose(out['norm'][out['iteration']==1], 2*out['norm'][out['iteration']==0], rtol=1e-6)

def test_a_backward_that_breaks():
    "leaves no row, and training goes on"
    model,opt,rec,loss = mlp_recorder()
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): raise ZeroDivisionError
    with rec:
        loss().backward(); opt.step(); opt.zero_grad()
        x = Breaks.apply(model[0](torch.ones(2,6)))
        with pytest.raises(ZeroDivisionError): model[2](x).sum().backward()
        opt.zero_grad()
        loss().backward(); opt.step(); opt.zero_grad()
    assert rec.df[rec.df['kind']=='output'].groupby('step').size().tolist()==[2,2] and len(rec.steps)==2

def test_what_does_not_train():
    "Validation under `no_grad`, `autograd.grad` and a second model leave no row"
    model,opt,rec,loss = mlp_recorder()
    other = nn.Linear(6,3)
    with rec:
        for _ in range(2):
            loss().backward(); opt.step(); opt.zero_grad()
            with torch.no_grad(): loss()
            torch.autograd.grad(loss(), list(model.parameters()))
            other(torch.ones(2,6)).sum().backward()
    assert rec.df.groupby('step').size().tolist()==[6,6] and len(rec.steps)==2

def test_parameters_alone():
    model,opt,rec,loss = mlp_recorder(kind='param')
    want = []
    with rec:
        for _ in range(3):
            loss().backward()
            want.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
            opt.step(); opt.zero_grad()
    np.testing.assert_allclose(rec.norms, want, rtol=1e-6)
    assert rec.steps['iteration'].tolist()==[0,1,2] and rec.df['iteration'].unique().tolist()==[0,1,2]

@pytest.mark.parametrize('exc', (KeyboardInterrupt, RuntimeError))
def test_interrupted(exc):
    "What is half done is discarded; a second `with` is a second fit; `stop` may be called twice"
    model,opt,rec,loss = mlp_recorder()
    with pytest.raises(exc):
        with rec:
            loss().backward(); opt.step(); opt.zero_grad()
            loss().backward()
            rec.read()
            raise exc
    assert len(rec.steps)==1 and rec.df.groupby('iteration').size().tolist()==[6,2]
    assert not _global_forward_hooks and not opt._optimizer_step_pre_hooks
    with rec:
        loss().backward(); opt.step(); opt.zero_grad()
    rec.stop()
    rec.stop()
    assert rec.steps['fit'].tolist()==[0,1] and rec.steps['step'].tolist()==[0,1]

def test_an_optimizer_that_raises():
    "A step that raised is over, and none that was taken: it is there as skipped, with its loss, and the batch after it has all its rows"
    class Fails(torch.optim.SGD):
        fails = False
        def step(self, closure=None):
            if self.fails: raise ZeroDivisionError
            return super().step()
    model,opt,rec,loss = mlp_recorder(lambda ps: Fails(ps, lr=.1))
    want = []
    with rec:
        for i in range(4):
            opt.fails = i==1
            rec.loss(l := loss())
            l.backward()
            want.append(norm_of(model))
            try: opt.step()
            except ZeroDivisionError: pass
            opt.zero_grad()
    assert rec.steps['skipped'].tolist()==[False,True,False,False] and rec.steps['iteration'].tolist()==[0,1,2,3]
    np.testing.assert_allclose(rec.norms, want, rtol=1e-6)
    assert rec.steps['loss'].notna().all()
    assert rec.df.groupby('iteration').size().tolist()==[6]*4

def test_a_step_left_out_by_hand():
    "Read, found wanting and cleared: a skipped step with its own loss and samples"
    model,opt,rec,loss = mlp_recorder()
    losses = []
    with rec:
        for i in range(3):
            rec.loss(l := loss())
            losses.append(l.item())
            l.backward()
            rec.read()
            if i!=1: opt.step()
            opt.zero_grad()
    assert rec.steps['skipped'].tolist()==[False,True,False] and rec.steps['bs'].tolist()==[8]*3
    np.testing.assert_allclose(rec.steps['loss'], losses, rtol=1e-6)

class StepsOnly:
    "An optimizer that has a `step`, and nothing else"
    def __init__(self, params): self.params = list(params)
    @torch.no_grad()
    def step(self):
        for p in self.params: p -= .1*p.grad

def test_an_optimizer_that_only_steps():
    model,opt,rec,loss = mlp_recorder(StepsOnly, update_every=1)
    want = []
    with rec:
        for _ in range(3):
            loss().backward()
            want.append(norm_of(model))
            opt.step()
            model.zero_grad()
    np.testing.assert_allclose(rec.norms, want, rtol=1e-6)
    np.testing.assert_allclose(rec.steps['update_norm'], .1*np.array(want), rtol=1e-4)
    assert 'step' not in opt.__dict__

def test_no_step_is_seen():
    "Without an optimizer, or with one that does not step, outputs are recorded and a sentence says what is not"
    model,opt,_,loss = mlp_recorder()
    def train(rec, read):
        with rec:
            for _ in range(2):
                loss().backward()
                if read: rec.read()
                opt.step()
                opt.zero_grad()
        assert not len(rec.steps) and rec.kinds_recorded()==['output']
    for other,read,says in ((None,False,'No optimizer was given'), (None,True,'read.*No optimizer'), (torch.optim.Adam(seeded_mlp().parameters()),False,'No step of Adam')):
        with pytest.warns(UserWarning, match=says): train(GradRecorder(model, other), read)
    with warnings.catch_warnings(action='error'):
        with GradRecorder(model, kind='output'): loss().backward()
        with pytest.raises(KeyboardInterrupt), GradRecorder(model, opt):   # no time for one
            loss().backward()
            raise KeyboardInterrupt

def test_with_inside_with():
    "The outermost stops it"
    model,opt,rec,loss = mlp_recorder()
    def epoch():
        with rec: loss().backward(); opt.step(); opt.zero_grad()
    with rec:
        for _ in range(2): epoch()
    assert rec.steps['fit'].tolist()==[0,0] and not _global_forward_hooks
    epoch()
    assert rec.steps['fit'].tolist()==[0,0,1]

@pytest.mark.parametrize('copies', (copy, deepcopy, pickle.dumps))
def test_a_recorder_is_not_copied(copies):
    "Its record is"
    model,opt,rec,loss = mlp_recorder()
    with rec: loss().backward(); opt.step()
    with pytest.raises(TypeError, match='rec.record'): copies(rec)
    assert pickle.loads(pickle.dumps(rec.record)).df.equals(rec.df)

# --- the rest of the package

def test_plots_findings_report_files(tmp_path):
    model,opt,rec,loss = mlp_recorder(folder=tmp_path/'run', hist=True)
    with rec:
        for _ in range(25):
            rec.loss(l := loss())
            l.backward(); opt.step(); opt.zero_grad()
    for plot in (rec.plot_grad_log10, rec.plot_grad_heatmap, rec.plot_grad_norm, rec.plot_grad_flow): assert plot().has_data()
    assert diagnose(rec).ok
    save_report(rec, tmp_path/'page.html')
    back = type(rec.record).load(tmp_path/'run')
    pd.testing.assert_frame_equal(back.df, rec.df)
    pd.testing.assert_frame_equal(back.steps, rec.steps)
    assert 'GradRecorder' in repr(rec) and rec._repr_html_()

def test_bad_arguments():
    model = nn.Linear(2,1)
    for f,msg in ((lambda: GradRecorder('model', None), 'model'), (lambda: GradRecorder(model, 3), 'opt'), (lambda: GradRecorder(model, torch.optim.SGD), 'opt'), (lambda: GradRecorder(model, scaler=3), 'scaler'), (lambda: GradRecorder(model, kind='all'), 'kind'),
                  (lambda: GradRecorder(model, include='nothing'), 'include'), (lambda: GradRecorder(model, every=2, update_every=3), 'update_every'),
                  (lambda: GradRecorder(model, modules=[nn.Linear(2,1)]), 'modules')):
        with pytest.raises((TypeError,ValueError), match=msg): f()

def test_every():
    "One iteration and one step in two, counted as all are"
    model,opt,rec,loss = mlp_recorder(every=2)
    want = []
    with rec:
        for i in range(5):
            l = loss()
            l.backward()
            if i%2==0: want.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
            opt.step(); opt.zero_grad()
    assert rec.df.groupby('iteration').size().to_dict()=={0:6,2:6,4:6}
    assert rec.steps['step'].tolist()==rec.steps['iteration'].tolist()==[0,2,4]
    np.testing.assert_allclose(rec.norms, want, rtol=1e-6)
