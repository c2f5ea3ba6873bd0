"What is compared: nothing at all, this package, and what users would pick instead, all as callbacks that act on every step"
import os,tempfile
from fastai.basics import *
from fastai.callback.hook import ActivationStats, HookCallback
from fastai_gradstats.by_blocks import BlockBuffer
from fastai_gradstats.stats import sums
from fastai_gradstats import GradAlert, GradNormCallback, GradStatsCallback

def abs_10_power(x): return (x.abs() + 1e-30).log10().flatten().numpy().astype(int)

class ThreadHook(HookCallback):
    "As posted in forums.fast.ai/t/81494"
    def __init__(self): super().__init__(is_forward=False)
    def before_fit(self):
        super().before_fit()
        self.out_grads = L()
    def hook(self, m, i, o): self.out_grads.append(abs_10_power(o[0]))

class WandbWatch(Callback):
    "`wandb.watch(model, log='gradients', log_freq=1)`, offline"
    def __init__(self):
        import wandb
        self.dir,self.wandb,self.log = tempfile.TemporaryDirectory(),wandb,None
    def before_fit(self):
        if self.log: return
        os.environ['WANDB_SILENT'] = 'true'
        self.log = self.wandb.init(mode='offline', dir=self.dir.name)
        self.log.watch(self.model, log='gradients', log_freq=1)
    def after_batch(self): self.log.log({})
    def close(self):
        if self.log: self.log.finish()
        self.dir.cleanup()

class TensorBoard(Callback):
    "`add_histogram` of the gradient of every parameter"
    def __init__(self):
        from torch.utils.tensorboard import SummaryWriter
        self.dir,self.n = tempfile.TemporaryDirectory(),0
        self.writer = SummaryWriter(self.dir.name)
    def before_step(self):
        for n,p in self.model.named_parameters(): self.writer.add_histogram(n, p.grad, self.n)
        self.n += 1
    def close(self):
        self.writer.close()
        self.dir.cleanup()

class LightningNorm(Callback):
    "`grad_norm`, with its results as the floats that a logger needs"
    def __init__(self):
        from lightning.pytorch.utilities import grad_norm
        self.f,self.norms_ = grad_norm,[]
    def before_step(self): self.norms_.append({k:float(v) for k,v in self.f(self.model, 2).items()})

class GradVizHook(Callback):
    "gradviz: norms of parameter gradients"
    def __init__(self):
        import gradviz
        self.cls,self.gv = gradviz.GradViz,None
    def before_fit(self):
        if not self.gv:
            self.gv = self.cls(self.model)
            self.gv.attach()
    def after_step(self): self.gv.step()

def both(**kwargs): return [GradStatsCallback(**kwargs), GradNormCallback(**{k:v for k,v in kwargs.items() if k=='every'})]

def reader_of(learn):
    "What reads the gradients of a Learner for all callbacks of ours; None where there are none"
    return next((c._consumer.reader for c in learn.cbs if isinstance(c, (GradStatsCallback,GradNormCallback,GradAlert))), None)

class WithoutNumba(Callback):
    "The others read as where numba is not installed"
    order = 1000   # once the engine is made
    def before_train(self):
        engine,cpu = reader_of(self.learn).engine,torch.device('cpu')
        engine.buffers[cpu] = BlockBuffer(cpu, engine.threshold, len(sums)+len(engine.extra), engine.hist)

ours = {
    'norm':            lambda: [GradNormCallback()],
    'alert':           lambda: [GradAlert()],
    'norm, alert':     lambda: [GradNormCallback(), GradAlert()],
    'param':           lambda: [GradStatsCallback(kind='param')],
    'output':          lambda: [GradStatsCallback(kind='output')],
    'both':            both,
    'both, every=10':  partial(both, every=10),
    'both, hist':      partial(both, hist=True),
    'both, no numba':  lambda: [*both(), WithoutNumba()]}
others = {
    'ActivationStats': lambda: [ActivationStats()],
    "thread's hook":   lambda: [ThreadHook()],
    'wandb.watch':     lambda: [WandbWatch()],
    'TensorBoard':     lambda: [TensorBoard()],
    'Lightning':       lambda: [LightningNorm()],
    'gradviz':         lambda: [GradVizHook()]}

def close(learn):
    for c in learn.cbs:
        if type(c).__module__==__name__ and 'close' in type(c).__dict__: c.close()
