"Each gradient is read once a step, whoever wants its numbers, and where a number is read again it is known how often."
from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch as mock

import pytest
import torch
from fastai.basics import SGD, Callback, Learner, OptimWrapper
from torch import nn

from fastai_gradstats import GradNormCallback, GradStatsCallback, by_kernel, by_rows, engine
from helpers.callbacks import ByRows, TrainOnly
from helpers.training import fit, vector_batches

READ_STEPS = 4

def counted_net():
    "Two layers and a norm between them, each parameter of another size, so that a size tells whose it is"
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6,9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9,3))

def sizes_of(model, bs=8):
    "Elements of each parameter, and of each output that has rows"
    params = Counter(p.numel() for p in model.parameters())
    return params,Counter([bs*9, bs*9, bs*3])

def counting_learner(*cbs, opt_func=SGD, bs=8):
    return Learner(vector_batches(READ_STEPS, bs), counted_net(), loss_func=nn.CrossEntropyLoss(), opt_func=opt_func, lr=.1, cbs=[*cbs, TrainOnly()])

# --- by the kernel: each call has the address of what it reads

class KernelReads:
    "The kernel, with a note of each tensor that it reads"
    def __init__(self, kernel):
        self.kernel = kernel
        self.notes = []     # (address, elements, all sums?, with the weights?)
        self.model = None   # whose parameters' gradients are told by their addresses
        self.names = []     # of what was read; None for an output

    def __getattr__(self, name): return getattr(self.kernel, name)

    def note(self, at, n, full, weights):
        self.notes.append((at, n, bool(full), bool(weights)))
        params = self.model.named_parameters() if self.model else ()
        self.names.append(next((name for name,p in params if p.grad is not None and p.grad.data_ptr()==at), None))

    def read(self, at, w, n, limit, full, weights, acc, row):
        self.note(at, n, full, weights)
        self.kernel.read(at, w, n, limit, full, weights, acc, row)

    def read_all(self, tensors, limit, full, weights, acc, first):
        for at,_,n in tensors[:,tensors.all(0)].T.tolist(): self.note(at, n, full, weights)
        self.kernel.read_all(tensors, limit, full, weights, acc, first)

@contextmanager
def kernel_reads():
    kernel = by_kernel.find_kernel()
    if kernel is None: pytest.skip('numba is not here')
    reads = KernelReads(kernel)
    with mock.object(by_kernel, 'find_kernel', lambda: reads): yield reads

@pytest.mark.parametrize('opt_func', [SGD, lambda params, **kw: OptimWrapper(params, torch.optim.SGD, **kw)])
def test_both_callbacks_read_once(opt_func):
    "Each parameter's gradient and each output's: once a step, together with its weights"
    learn = counting_learner(GradStatsCallback(), GradNormCallback(), opt_func=opt_func)
    with kernel_reads() as reads:
        reads.model = learn.model
        fit(learn)
    _,outputs = sizes_of(learn.model)
    of_outputs = [n for (_,n,*_),name in zip(reads.notes, reads.names) if name is None]
    assert Counter(of_outputs)==Counter({n:READ_STEPS*k for n,k in outputs.items()})
    assert Counter(filter(None, reads.names))==Counter({name:READ_STEPS for name,_ in learn.model.named_parameters()})
    assert all(full and weights==(name is not None) for (_,_,full,weights),name in zip(reads.notes, reads.names))

@pytest.mark.parametrize('cbs,full', [([GradStatsCallback], True), ([GradNormCallback], False)])
def test_one_callback_reads_once(cbs, full):
    with kernel_reads() as reads: learn = fit(counting_learner(*(c() for c in cbs)))
    params,outputs = sizes_of(learn.model)
    wanted = params+outputs if full else params
    assert Counter(n for _,n,*_ in reads.notes)==Counter({n:READ_STEPS*k for n,k in wanted.items()})
    assert {o[2] for o in reads.notes}=={full}

def test_three_callbacks_read_once():
    "A third that wants less of the same, with an `every` of its own, costs nothing"
    few = GradStatsCallback(every=2, include=r'^3')
    with kernel_reads() as reads: learn = fit(counting_learner(GradStatsCallback(), GradNormCallback(), few))
    params,outputs = sizes_of(learn.model)
    assert Counter(n for _,n,*_ in reads.notes)==Counter({n:READ_STEPS*k for n,k in (params+outputs).items()})
    assert set(few.df['name'])=={'3','3.weight','3.bias'} and len(few.df)==3*READ_STEPS/2

def test_what_nobody_wants_is_not_read():
    "Of steps and tensors that no callback asks for"
    with kernel_reads() as reads: fit(counting_learner(GradStatsCallback(every=2, include=r'^3')))
    assert Counter(n for _,n,*_ in reads.notes)=={27:2, 3:2, 24:2}

def test_norms_of_those_that_only_the_norm_needs():
    "A norm needs sums of squares; who wants all sums of two tensors makes nobody read the others' in full"
    with kernel_reads() as reads: learn = fit(counting_learner(GradNormCallback(), GradStatsCallback(kind='param', include=r'^3')))
    params,_ = sizes_of(learn.model)
    assert Counter(n for _,n,*_ in reads.notes)==Counter({n:READ_STEPS*k for n,k in params.items()})
    assert all(full==(n in (27,3)) for _,n,full,_ in reads.notes)

# --- the user's functions, and thresholds

@contextmanager
def extra_reads():
    "A note of each copy that is read for a column beside the sums: elements"
    notes = []
    def counted(f, g):
        notes.append(g.numel())
        return engine_apart(f, g)
    engine_apart = engine.apart_from_training
    with mock.object(engine, 'apart_from_training', counted): yield notes

def test_another_threshold_is_one_column_more():
    "`above` of the second threshold is read once more, from a copy; all other numbers come from the one read"
    low = GradStatsCallback(threshold=1e-3)
    with kernel_reads() as reads, extra_reads() as extra: learn = fit(counting_learner(GradStatsCallback(), GradNormCallback(), low))
    params,outputs = sizes_of(learn.model)
    once = Counter({n:READ_STEPS*k for n,k in (params+outputs).items()})
    assert Counter(n for _,n,*_ in reads.notes)==once
    assert Counter(extra)==once
    assert (low.df['above']>0).any()

def test_thresholds_share_their_columns():
    "A column per threshold, not per callback"
    cbs = [GradStatsCallback(), GradStatsCallback(threshold=.1), GradStatsCallback(threshold=.1, every=2), GradStatsCallback(threshold=.01)]
    with extra_reads() as extra: learn = fit(counting_learner(*cbs))
    params,outputs = sizes_of(learn.model)
    assert Counter(extra)==Counter({n:2*READ_STEPS*k for n,k in (params+outputs).items()})

def test_functions_of_the_user_share_their_columns():
    "One function that two callbacks name is called once for each gradient"
    def spread(g): return g.max()-g.min()
    with extra_reads() as extra: learn = fit(counting_learner(*(GradStatsCallback(kind='param', extra=dict(spread=spread)) for _ in range(2))))
    params,_ = sizes_of(learn.model)
    assert Counter(extra)==Counter({n:READ_STEPS*k for n,k in params.items()})

# --- by rows, as on a GPU: each copy to the scratch is a read

@contextmanager
def row_reads():
    "Notes of what is copied to the scratch: elements of gradients, and of weights"
    grads,weights = Counter(),Counter()
    several,copy = by_rows.RowBuffer.several,by_rows.RowBuffer.copy
    def counted_several(self, rows, gs, ws, full):
        grads.update(g.numel() for g in gs)
        weights.update(w.numel() for w in ws or ())
        several(self, rows, gs, ws, full)
    def counted_copy(self, row, x, dtype, scale):
        grads[x.numel()] += 1
        copy(self, row, x, dtype, scale)
    with mock.object(by_rows.RowBuffer, 'several', counted_several), mock.object(by_rows.RowBuffer, 'copy', counted_copy): yield grads,weights

@pytest.mark.parametrize('more', [[], [dict(every=2, include=r'^3')], [dict(threshold=1e-3)]], ids=['two','three','threshold'])
def test_by_rows_reads_once(more):
    with row_reads() as (grads,weights): learn = fit(counting_learner(ByRows(), GradNormCallback(), *(GradStatsCallback(**o) for o in more)))
    params,outputs = sizes_of(learn.model)
    assert grads==Counter({n:READ_STEPS*k for n,k in (params+outputs).items()})
    assert weights==Counter({n:READ_STEPS*k for n,k in params.items()})

# --- and where it has to be more

class HalvesGradients(Callback):
    "Somebody acts on gradients"
    run_valid = False
    def __init__(self, order): self.order = order
    def before_step(self):
        for p in self.model.parameters(): p.grad.mul_(.5)

@pytest.mark.parametrize('order', [0, 50], ids=['before','after'])
def test_who_acts_costs_another_read(order):
    "Ahead of us: what was before is read too. After us: what the optimizer gets is"
    norm = GradNormCallback()
    with kernel_reads() as reads: learn = fit(counting_learner(norm, HalvesGradients(order)))
    params,_ = sizes_of(learn.model)
    assert Counter(n for _,n,*_ in reads.notes)==Counter({n:2*READ_STEPS*k for n,k in params.items()})
    assert norm.steps['clipped_norm'].to_numpy()==pytest.approx(norm.steps['norm'].to_numpy()*(1 if order==0 else .5))
