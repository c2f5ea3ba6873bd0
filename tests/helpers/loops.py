"Learners whose batch, backward or step is not fastai's."
from fastai.basics import *

class CreatesGraph(Learner):
    "Gradients that are part of a graph themselves"
    def _backward(self): self.loss_grad.backward(create_graph=True)

class TwoLosses(Learner):
    "Two backwards before each step"
    def _backward(self):
        self.loss_grad.backward(retain_graph=True)
        (self.pred.square().mean()).backward()

class TwoStepsPerBatch(Learner):
    "Backward and step twice for each batch"
    def _do_one_batch(self):
        super()._do_one_batch()
        if not self.training: return
        self.pred = self.model(*self.xb)
        self.loss_grad = self.loss = self.loss_func(self.pred, *self.yb)
        self._do_grad_opt()

class WithoutSteps(Learner):
    "Weights stay as they are, whatever their gradients"
    def _step(self): pass
