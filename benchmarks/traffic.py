"What reading costs a GPU without a kernel of ours: launches and bytes that both callbacks add to a step"
from functools import partial
from unittest import mock
import pandas as pd
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchvision.models import resnet18, resnet50
from . import counts
from .models import images
from .peers import both

class Bytes(counts.Ops):
    "Counts also the bytes of operations that are work: of each tensor among arguments and results once, as large as it is"
    def clear(self):
        super().clear()
        self.bytes = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        before = self.work
        result = super().__torch_dispatch__(f, types, args, kwargs)
        if self.work>before:
            tensors = {id(t):t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor) and t.device.type!='cpu'}
            self.bytes += sum(t.numel()*t.itemsize for t in tensors.values())
        return result

def step(model, batch, cbs):
    "Operations of the third step, the first two of which make what is kept"
    with mock.patch.object(counts, 'Ops', Bytes): return counts.device_step(model, batch, cbs)

def once(model, batch):
    "Bytes of what is read, each tensor once: gradients of outputs, outputs, gradients of parameters and weights"
    model,(x,_) = model().to('meta'),batch()
    outputs = []
    for m in model.modules():
        if m._parameters: m.register_forward_hook(lambda m,i,o: outputs.append(o))
    model(x.to('meta'))
    return 2*sum(t.numel()*t.itemsize for t in (*outputs, *model.parameters()))

cases = {  # name -> functions that make the model and its batch
    'resnet18, 32x3x64x64':   (partial(resnet18, num_classes=10), partial(images, 32, 64)),
    'resnet50, 32x3x224x224': (resnet50, partial(images, 32, 224))}

def gpu_traffic(cases=cases)->pd.DataFrame:
    "Of each model: operations and bytes that both callbacks add to a step on a GPU, and the bytes of reading everything once"
    rows = []
    for name,(model,batch) in cases.items():
        ours,bare = (step(model, batch, cbs) for cbs in (both(), []))
        moved,minimum = ours.bytes-bare.bytes,once(model, batch)
        rows.append(dict(model=name, launches=ours.work-bare.work, bytes=moved, minimum=minimum, ratio=moved/minimum))
    return pd.DataFrame(rows)

if __name__=='__main__': print(gpu_traffic().to_string(index=False))
