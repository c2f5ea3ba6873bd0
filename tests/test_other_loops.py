"Hugging Face's Trainer and Lightning: what is recorded is what torch says in the framework's own event, and training is the same as without."
import importlib.util,logging
import numpy as np,pytest,torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader,TensorDataset
from fastai_gradstats import GradRecorder,loops
from helpers.training import same_tensors,seeded_mlp,vector_data

SAMPLES,BATCH_SIZE = 48,8
N_STEPS = SAMPLES//BATCH_SIZE

def norm_of_params(model): return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
def weights_of(model): return [p.detach().clone() for p in model.parameters()]

def nothing_stays(optimizer):
    "No hook of ours is on modules or on the optimizer"
    while hasattr(optimizer, 'optimizer'): optimizer = optimizer.optimizer   # accelerate's and Lightning's have torch's inside
    hooks = nn.modules.module._global_forward_hooks,optimizer._optimizer_step_pre_hooks,optimizer._optimizer_step_post_hooks
    return not any(hooks)

def check_rows_of(grads, norms, per_step=1):
    "Each step has the gradient that the framework shows in this step, not that of the one before"
    steps = grads.steps
    np.testing.assert_allclose(steps['norm'], norms, rtol=1e-5)
    params = grads.select(kind='param').df
    of_step = params.groupby('step')['norm'].agg(lambda norms: np.sqrt((norms**2).sum()))
    np.testing.assert_allclose(of_step, norms, rtol=1e-5)
    last_of_step = [*range(per_step-1, per_step*len(norms), per_step)]
    assert steps['iteration'].tolist()==params.drop_duplicates('step')['iteration'].tolist()==last_of_step
    assert steps['bs'].tolist()==[BATCH_SIZE*per_step]*len(norms)
    outs = grads.select(kind='output').df
    assert outs.groupby('iteration').size().tolist()==[2]*per_step*len(norms)
    assert (outs['step']==outs['iteration']//per_step).all()

# --- Hugging Face

needs_trainer = pytest.mark.skipif(not (importlib.util.find_spec('transformers') and importlib.util.find_spec('accelerate')),
                                   reason='transformers and accelerate are not installed')

class ReturnsLoss(nn.Module):
    "What Trainer wants of a model"
    def __init__(self):
        super().__init__()
        self.net = seeded_mlp()
    def forward(self, x, labels):
        pred = self.net(x)
        return dict(loss=F.cross_entropy(pred, labels), logits=pred)

def hf_trainer(folder, *cbs, model=None, **kwargs):
    from transformers import Trainer,TrainingArguments
    from transformers.trainer_callback import PrinterCallback
    x,y = vector_data(SAMPLES)
    data = [dict(x=a, labels=b) for a,b in zip(x, y)]
    quiet = dict(save_strategy='no', report_to='none', disable_tqdm=True)
    wanted = dict(num_train_epochs=1, learning_rate=.1, logging_steps=1) | kwargs
    args = TrainingArguments(folder, use_cpu=True, per_device_train_batch_size=BATCH_SIZE, **quiet, **wanted)
    trainer = Trainer(model or ReturnsLoss(), args, train_dataset=data, eval_dataset=data, callbacks=list(cbs))
    trainer.remove_callback(PrinterCallback)
    return trainer

def asks_torch():
    "Total norms in Trainer's event ahead of the step"
    from transformers import TrainerCallback
    class AsksTorch(TrainerCallback):
        def __init__(self): self.norms = []
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs): self.norms.append(norm_of_params(model))
    return AsksTorch()

def hf_raises(error, at):
    from transformers import TrainerCallback
    class Raises(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step==at: raise error
    return Raises()

def logged(trainer, what): return [line[what] for line in trainer.state.log_history if what in line]

@needs_trainer
@pytest.mark.parametrize('kwargs,per_step', (
    (dict(max_grad_norm=0.), 1), ({}, 1), (dict(max_grad_norm=.1), 1),
    (dict(gradient_accumulation_steps=2, max_grad_norm=0.), 2), (dict(gradient_accumulation_steps=3, max_grad_norm=.1), 3)),
    ids=('unclipped','default','clipped','accumulated','accumulated-clipped'))
def test_trainer(kwargs, per_step, tmp_path):
    grads,truth = loops.GradTrainerCallback(),asks_torch()
    trainer = hf_trainer(tmp_path, grads, truth, **kwargs)
    trainer.train()
    assert len(truth.norms)==N_STEPS//per_step
    check_rows_of(grads, truth.norms, per_step)
    assert (grads.steps['clip_coef']==1).all() and grads.steps['loss'].isna().all()
    max_norm = kwargs.get('max_grad_norm', 1.)
    if max_norm: np.testing.assert_allclose(grads.steps['norm'], np.minimum(logged(trainer, 'grad_norm'), max_norm), rtol=1e-4)
    assert nothing_stays(trainer.optimizer)

@needs_trainer
@pytest.mark.parametrize('kwargs', (pytest.param({}, marks=pytest.mark.slow), dict(gradient_accumulation_steps=2, max_grad_norm=.1)), ids=('plain','accumulated-clipped'))
def test_trainer_trains_the_same(kwargs, tmp_path):
    bare,watched = hf_trainer(tmp_path, **kwargs),hf_trainer(tmp_path, loops.GradTrainerCallback(hist=True, update_every=1), **kwargs)
    for trainer in (bare,watched): trainer.train()
    assert logged(bare, 'loss')==logged(watched, 'loss')!=[]
    assert same_tensors(weights_of(bare.model), weights_of(watched.model))

@pytest.mark.slow
@needs_trainer
def test_trainer_twice(tmp_path):
    "Two trainings are fits 0 and 1 of one record"
    grads,truth = loops.GradTrainerCallback(),asks_torch()
    trainer = hf_trainer(tmp_path, grads, truth, num_train_epochs=2)
    for _ in range(2): trainer.train()
    steps = grads.steps
    assert steps['fit'].tolist()==[0]*2*N_STEPS+[1]*2*N_STEPS
    assert steps['epoch'].tolist()==([0]*N_STEPS+[1]*N_STEPS)*2
    np.testing.assert_allclose(steps['norm'], truth.norms, rtol=1e-5)
    assert nothing_stays(trainer.optimizer)

@needs_trainer
def test_trainer_evaluates(tmp_path):
    "Evaluation between steps leaves no row, and no step is late"
    grads,truth = loops.GradTrainerCallback(),asks_torch()
    trainer = hf_trainer(tmp_path, grads, truth, eval_strategy='steps', eval_steps=2)
    trainer.train()
    assert len(logged(trainer, 'eval_loss'))==N_STEPS//2
    check_rows_of(grads, truth.norms)

@needs_trainer
@pytest.mark.parametrize('error', (RuntimeError, pytest.param(KeyboardInterrupt, marks=pytest.mark.slow)))
def test_trainer_is_stopped(error, tmp_path):
    "Trainer tells nobody: hooks go at the next forward with gradients. What was complete is kept"
    grads,truth = loops.GradTrainerCallback(),asks_torch()
    trainer = hf_trainer(tmp_path, grads, truth, hf_raises(error('test'), at=3))
    def stopped():
        with pytest.raises(error): trainer.train()
        trainer.model(*vector_data(BATCH_SIZE))   # not in training
        return nothing_stays(trainer.optimizer)
    assert stopped()
    check_rows_of(grads, truth.norms)
    assert stopped()
    assert grads.steps['fit'].tolist()==[0]*3+[1]*3
    np.testing.assert_allclose(grads.steps['norm'], truth.norms, rtol=1e-5)

@pytest.mark.slow
@needs_trainer
def test_trainer_of_another_model(tmp_path):
    grads = loops.GradTrainerCallback()
    hf_trainer(tmp_path, grads).train()
    with pytest.raises(ValueError, match='another model'): hf_trainer(tmp_path, grads).train()

@needs_trainer
def test_a_loop_with_accelerate():
    "The prepared optimizer's `step` does nothing while gradients accumulate: that is no step"
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = seeded_mlp()
    model,opt = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=.1))
    norms = []
    with GradRecorder(model, opt) as rec:
        for batch in DataLoader(TensorDataset(*vector_data(SAMPLES)), BATCH_SIZE):
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(batch[0]), batch[1]))
                if accelerator.sync_gradients: norms.append(norm_of_params(model))
                opt.step()
                opt.zero_grad()
    check_rows_of(rec, norms, per_step=2)
    assert nothing_stays(opt)

# --- Lightning

needs_lightning = pytest.mark.skipif(not importlib.util.find_spec('lightning'), reason='lightning is not installed')

def lit_module(manual=False):
    import lightning.pytorch as pl
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not manual
            self.net = seeded_mlp()
            self.losses = []
            self.norms = []   # total norms in Lightning's event ahead of clipping

        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=.1)
        def on_before_optimizer_step(self, optimizer): self.norms.append(norm_of_params(self))
        def loss(self, batch):
            x,y = batch
            loss = F.cross_entropy(self.net(x), y)
            self.losses.append(loss.item())
            return loss

        def training_step(self, batch, i):
            if not manual: return self.loss(batch)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, gradient_clip_val=.1)
            optimizer.step()
        def validation_step(self, batch, i): F.cross_entropy(self.net(batch[0]), batch[1])
    return Module()

def lit_fit(module, *cbs, valid=False, **kwargs):
    import lightning.pytorch as pl
    for name in ('pytorch','fabric'): logging.getLogger(f'lightning.{name}').setLevel(logging.ERROR)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(accelerator='cpu', max_epochs=kwargs.pop('max_epochs', 1), callbacks=list(cbs), **quiet, **kwargs)
    loader = DataLoader(TensorDataset(*vector_data(SAMPLES)), BATCH_SIZE)
    trainer.fit(module, loader, loader if valid else None)
    return trainer

def lit_raises(error, at):
    import lightning.pytorch as pl
    class Raises(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step==at: raise error
    return Raises()

@needs_lightning
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kwargs,per_step', (
    ({}, 1), (dict(gradient_clip_val=.1), 1), (dict(accumulate_grad_batches=2), 2),
    (dict(accumulate_grad_batches=3, gradient_clip_val=.1), 3), (dict(valid=True, val_check_interval=2), 1)),
    ids=('plain','clipped','accumulated','accumulated-clipped','validates'))
def test_lightning(kwargs, per_step):
    grads,module = loops.GradLightningCallback(),lit_module()
    trainer = lit_fit(module, grads, **kwargs)
    assert len(module.norms)==N_STEPS//per_step
    check_rows_of(grads, module.norms, per_step)
    np.testing.assert_allclose(grads.steps['clipped_norm'], np.minimum(module.norms, kwargs.get('gradient_clip_val', np.inf)), rtol=1e-4)
    np.testing.assert_allclose(grads.steps['loss'], module.losses[per_step-1::per_step], rtol=1e-6)
    assert nothing_stays(trainer.optimizers[0])

@needs_lightning
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('manual', (False,True), ids=('automatic','manual'))
def test_lightning_trains_the_same(manual):
    bare,watched = lit_module(manual),lit_module(manual)
    kwargs = {} if manual else dict(accumulate_grad_batches=2, gradient_clip_val=.1)
    lit_fit(bare, **kwargs)
    lit_fit(watched, loops.GradLightningCallback(hist=True, update_every=1), **kwargs)
    assert bare.losses==watched.losses!=[]
    assert same_tensors(weights_of(bare), weights_of(watched))

@needs_lightning
@pytest.mark.filterwarnings('ignore')
def test_lightning_by_hand():
    "Manual optimization: what the optimizer got, after the module's own clipping"
    grads,module = loops.GradLightningCallback(),lit_module(manual=True)
    lit_fit(module, grads)
    check_rows_of(grads, module.norms)
    assert max(module.norms)<.1001 and (grads.steps['clip_coef']==1).all()
    np.testing.assert_allclose(grads.steps['loss'], module.losses, rtol=1e-6)

@needs_lightning
@pytest.mark.filterwarnings('ignore')
def test_lightning_twice():
    grads,module = loops.GradLightningCallback(),lit_module()
    for _ in range(2): lit_fit(module, grads, max_epochs=2)
    steps = grads.steps
    assert steps['fit'].tolist()==[0]*2*N_STEPS+[1]*2*N_STEPS
    assert steps['epoch'].tolist()==([0]*N_STEPS+[1]*N_STEPS)*2
    np.testing.assert_allclose(steps['norm'], module.norms, rtol=1e-5)

@needs_lightning
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('error', (RuntimeError, KeyboardInterrupt))
def test_lightning_is_stopped(error):
    "Hooks go at once, and what was complete is kept"
    grads,module = loops.GradLightningCallback(),lit_module()
    with pytest.raises((error, SystemExit)): lit_fit(module, grads, lit_raises(error('test'), at=3))   # Ctrl-C ends a script
    assert not nn.modules.module._global_forward_hooks
    assert not grads.recorder.reader.watches
    check_rows_of(grads, module.norms)
    lit_fit(module, grads)
    assert grads.steps['fit'].tolist()==[0]*3+[1]*N_STEPS

@needs_lightning
@pytest.mark.filterwarnings('ignore')
def test_lightning_lbfgs():
    "Lightning's event comes at each evaluation of the closure: the first is recorded, with its loss"
    module,grads = lit_module(),loops.GradLightningCallback()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters(), max_iter=3)
    lit_fit(module, grads)
    first = [i for i,loss in enumerate(module.losses) if np.isin(np.float32(loss), grads.steps['loss'].astype(np.float32))]
    assert len(module.norms)>N_STEPS==len(grads.steps) and first[0]==0
    check_rows_of(grads, [module.norms[i] for i in first])

@needs_lightning
@pytest.mark.filterwarnings('ignore')
def test_lightning_of_another_model():
    grads = loops.GradLightningCallback()
    lit_fit(lit_module(), grads)
    with pytest.raises(ValueError, match='another model'): lit_fit(lit_module(), grads)
