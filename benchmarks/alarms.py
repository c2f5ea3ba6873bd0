"Who raises an alarm when a step is out of line: this package and what else there is, each run as its own documentation says"
import json,tempfile
from collections import deque
from typing import NamedTuple
from fastai.basics import *
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai_gradstats import GradAlert

class Alarm(NamedTuple):
    step: int           # counted from 0; that of the batch it came with
    layer: str = None   # a module or a parameter, where one is named
    item: int = None    # index into the training set, where one is named

class Watcher(Callback):
    "Hands each step to a peer, and notes its alarms"
    def __init__(self, alarms): self.alarms = alarms
    def after_create(self): self.set_up()
    def set_up(self): pass
    def close(self): pass

class StabilityGuard(Watcher):
    "`GuardedOptimizer(optimizer, model)`: it decides whether the step is taken, fastai's optimizer takes it"
    def set_up(self):
        from stabilityguard import GuardedOptimizer
        class Deciding(torch.optim.SGD):
            taken = True
            def step(self, closure=None): self.taken = True
        self.dir = tempfile.TemporaryDirectory()
        self.base = Deciding(self.model.parameters(), lr=self.learn.lr)
        self.guard = GuardedOptimizer(self.base, self.model, log_dir=self.dir.name, verbose=False)

    def before_step(self):
        self.base.taken = False
        self.guard.step(loss=self.learn.loss.item())
        if self.base.taken: return
        report = json.loads(next(Path(self.dir.name).glob(f'*step{self.guard.step_count}.json')).read_text())
        self.alarms.append(Alarm(self.train_iter, report['snapshot']['spike_layer']))
        raise CancelStepException()

    def close(self):
        self.guard.close()
        self.dir.cleanup()

class Trainscope(Watcher):
    "`TrainScope(model, optimizer).attach()`, and `step` between backward and optimizer step"
    def set_up(self):
        from trainscope import TrainScope,TrainScopeConfig
        self.dir = tempfile.TemporaryDirectory()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.learn.lr)   # it reads the learning rate and Adam's state, no more
        self.scope = TrainScope(self.model, optimizer, config=TrainScopeConfig(run_dir=self.dir.name)).attach()

    def before_step(self):
        if self.scope.step(self.learn.loss.item(), batch_index=self.train_iter): self.alarms.append(Alarm(self.train_iter))

    def close(self):
        self.scope.detach()
        self.dir.cleanup()

class Ender(Watcher):
    "One that ends the training with its first alarm: from there on it does not look, so that others can watch the same training"
    order = -20   # before fastai counts the batch
    def after_batch(self):
        if self.alarms or not self.training: return
        if self.ends(): self.alarms.append(Alarm(self.train_iter))

class LightningSpikes(Ender):
    "Fabric's `SpikeDetection()`, called after each batch"
    def set_up(self):
        from lightning.fabric import Fabric
        from lightning.fabric.utilities.spike import SpikeDetection,TrainingSpikeException
        self.dir = tempfile.TemporaryDirectory()
        self.fabric = Fabric(accelerator='cpu', devices=1)
        self.detection = SpikeDetection(exclude_batches_path=self.dir.name)
        self.raised = TrainingSpikeException

    def ends(self):
        try: self.detection.on_train_batch_end(self.fabric, self.learn.loss.detach(), None, self.train_iter)
        except self.raised: return True

    def close(self): self.dir.cleanup()

class EndsOnNaN(Ender):
    "fastai's `TerminateOnNaNCallback`"
    def ends(self):
        try: TerminateOnNaNCallback.after_batch(self)
        except CancelFitException: return True

class ByHand(Watcher):
    "What is written by hand beside a logger: alert where the total norm is ten times its mean over 50 steps, or not finite"
    def set_up(self): self.norms = deque(maxlen=50)
    def before_step(self):
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
        is_spike = len(self.norms)>=10 and norm>10*np.mean(self.norms)
        if is_spike or not math.isfinite(norm): self.alarms.append(Alarm(self.train_iter))
        if math.isfinite(norm): self.norms.append(norm)

def grad_alert(alarms):
    "`GradAlert`, whose action notes and lets the step be taken"
    def note(incident):
        tensors,samples = incident.tensors,incident.samples
        item = samples['item'].iloc[0] if len(samples) else pd.NA
        alarms.append(Alarm(incident.iteration, tensors['name'].iloc[0] if len(tensors) else None, None if pd.isna(item) else int(item)))
    return GradAlert(action=note)

watchers = {   # name -> function of a list that gets the alarms
    'GradAlert': grad_alert,
    'stabilityguard': StabilityGuard,
    'trainscope': Trainscope,
    'Lightning SpikeDetection': LightningSpikes,
    'TerminateOnNaN': EndsOnNaN,
    'norm by hand': ByHand}

# Those that act on a step, or run it again, have a training of their own
together = [['GradAlert'], ['stabilityguard'], ['trainscope','Lightning SpikeDetection','TerminateOnNaN','norm by hand']]
