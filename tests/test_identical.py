"""Training is the same with and without the callbacks, bit for bit: losses, weights, buffers, the optimizer's state and every random
generator, in those cases of the page "When is a number right?" that no other file compares so."""
import io,random,warnings
from contextlib import redirect_stdout

import numpy as np,pytest,torch
import torch.nn.functional as F
from fastai.basics import *
from fastai.callback.all import *
from torch import nn

from fastai_gradstats import GradNormCallback,GradStatsCallback
from helpers.callbacks import CPUAmp,Overflow,OwnClip,RaisesAt,cancel_exceptions
from helpers.learners import classifier_toy,collab_toy,language_model_toy,tabular_toy,vision_toy
from helpers.loops import CreatesGraph,TwoLosses,TwoStepsPerBatch
from helpers.models import Branches,FunctionNet,FunctionWithWeight,convnext,random_pictures,swin,tensor_leaves,vit
from helpers.training import both_callbacks,fit,image_learner,linear_classifier,loaders,wrapped_sgd

def traces(learn):
    "All that training left behind, as bytes"
    g = [torch.get_rng_state(), *(torch.tensor(l.item()) for l in learn.recorder.losses), *learn.model.state_dict().values()]
    def walk(o):
        for k,v in sorted(o.items()) if isinstance(o, dict) else enumerate(o):
            if isinstance(v, Tensor): g.append(v)
            elif isinstance(v, (dict,list,tuple)): walk(v)
    walk(learn.opt.state_dict())
    tensors = [t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b'' for t in g]
    return tensors,random.getstate(),np.random.get_state()[1].tobytes(),str(learn.opt.hypers)

def check_same_bits(train, ours=both_callbacks):
    "`train` takes callbacks, builds a learner and trains it"
    res = []
    for cbs in ([], ours()):
        set_seed(0)
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn = train(cbs)
        res.append(traces(learn))
    a,b = res
    assert len(a[0])>4 and len(a[0])==len(b[0])
    assert [i for i,(x,y) in enumerate(zip(a[0], b[0])) if x!=y]==[] and a[1:]==b[1:]

# --- cases: functions that take callbacks, and return a Learner that was trained with them

def images(epochs=2, cbs=(), **kw):
    "Pictures, with arguments of `image_learner`; `cbs` are classes or functions that make callbacks"
    return lambda ours: fit(image_learner(cbs=[*ours, *(make() for make in cbs)], **kw), epochs)

def vectors_through(forward, epochs=1, loss=None, opt_func=Adam, cls=Learner, dtype=torch.float32, x=None, **modules):
    "Twelve vectors through a function of the net and its input; `modules`: functions that make them"
    def absolute(o, y): return sum(t.abs().mean() for t in tensor_leaves([o]))
    def train(cbs):
        net = FunctionNet(forward, **{k:make() for k,make in modules.items()})
        data = torch.randn(12,4, dtype=dtype) if x is None else x
        dls = loaders(data, torch.arange(len(data))%3, 4)
        return fit(cls(dls, net, loss_func=loss or absolute, opt_func=opt_func, lr=1e-2, cbs=cbs), epochs)
    return train

def pictures_through(model):
    return lambda cbs: fit(Learner(loaders(*random_pictures(), 2), model(), loss_func=F.cross_entropy, opt_func=Adam, lr=1e-3, cbs=cbs))

def call_quietly(learn, what, *args, **kw):
    with learn.no_bar(), learn.no_logging(): getattr(learn, what)(*args, **kw)

def fine_tuned(cbs):
    learn = vision_toy(cbs=cbs, train_bn=False)
    call_quietly(learn, 'fine_tune', 1)
    return learn

def in_stages(make):
    "Frozen, then more and more of it, then frozen again, at discriminative rates"
    def train(cbs):
        learn = make(cbs=cbs)
        for i in (1,2):
            learn.freeze_to(-i)
            fit(learn, lr=slice(1e-4,1e-2))
        call_quietly(learn, 'fine_tune', 1)
        learn.freeze()
        return fit(learn)
    return train

def twice(make): return lambda cbs: fit(make(cbs=cbs), 2)

def with_all_that_does_not_train(cbs):
    "Before, between and after"
    learn = image_learner(cbs=cbs)
    for _ in range(2):
        with learn.no_bar(), learn.no_logging():
            learn.validate()
            learn.get_preds()
            learn.lr_find(num_it=5, show_plot=False, suggest_funcs=None)
            learn.fit(1)
    return learn

def cancelled_and_interrupted(cbs):
    "In each way, and trained again"
    for i,exc in enumerate(cancel_exceptions):
        for event in ('before_batch','before_backward','after_step'):
            learn = image_learner(linear_classifier, [*cbs, RaisesAt(exc, event, 1, 5+15*(i%2))], n=48)
            try: fit(learn)
            except (KeyboardInterrupt,Exception): pass
            fit(learn)
            for c in cbs:
                learn.remove_cb(c)
                c.reset()
    return learn

def weight_and_chunk(w, x): return (x*w).chunk(2, 1)
def weight_and_transpose(w, x): return (x*w).t()
def empty_and_scaled(net, x): return torch.cat([net.empty(x), net.linear(x)*net.scale], 1)

adam_of_torch = partial(OptimWrapper, opt=torch.optim.Adam)
adamw_of_torch = partial(OptimWrapper, opt=partial(torch.optim.AdamW, weight_decay=.1))
words = torch.arange(24).view(12,2)%9

architectures = dict(
    vit=pictures_through(vit),
    swin=pictures_through(swin),
    convnext=pictures_through(convnext),
    vision=fine_tuned,
    tabular=in_stages(tabular_toy),
    collab=twice(collab_toy),
    language_model=twice(language_model_toy),
    text_classifier=in_stages(classifier_toy))

outputs = dict(
    lstm_with_dropout=vectors_through(lambda net,x: net.rnn(x[:,:,None]), epochs=2,
                                      rnn=lambda: nn.LSTM(1,3, 2, dropout=.3, batch_first=True)),
    dict_of_outputs=vectors_through(lambda net,x: dict(a=net.linear(x), b=[net.linear(x*2)]), linear=lambda: nn.Linear(4,3)),
    chunks_of_an_output=vectors_through(lambda net,x: net.chunk(net.linear(x)),
                                        linear=lambda: nn.Linear(4,4), chunk=lambda: FunctionWithWeight(weight_and_chunk)),
    view_changed_in_place=vectors_through(lambda net,x: net.linear(x[:,None]).relu_(), linear=lambda: nn.Linear(4,4)),
    hidden_view_changed_in_place=vectors_through(lambda net,x: net.transpose(net.linear(x)).add_(1), linear=lambda: nn.Linear(4,4),
                                                 transpose=lambda: FunctionWithWeight(weight_and_transpose)),
    called_twice=vectors_through(lambda net,x: net.linear(net.linear(x).relu_()), linear=lambda: nn.Linear(4,4)),
    data_parallel=vectors_through(lambda net,x: net.linear(x), linear=lambda: nn.DataParallel(nn.Linear(4,3))))

dtypes_and_layouts = dict(
    sparse_embedding=vectors_through(lambda net,x: net.embedding(x).mean(1), x=words, opt_func=wrapped_sgd,
                                     embedding=lambda: nn.Embedding(9,3, sparse=True)),
    float64=vectors_through(lambda net,x: net.linear(x).float(), dtype=torch.float64, linear=lambda: nn.Linear(4,3).double()),
    complex_weights=vectors_through(lambda net,x: net.linear(x.to(torch.complex64)), opt_func=adam_of_torch,
                                    linear=lambda: nn.Linear(4,4, dtype=torch.complex64)),
    empty_and_0d_parameters=vectors_through(empty_and_scaled, empty=lambda: nn.Linear(4,0), linear=lambda: nn.Linear(4,2),
                                            scale=lambda: nn.Parameter(torch.tensor(2.))))

odd_loops = dict(
    around_training=with_all_that_does_not_train,
    cancelled=cancelled_and_interrupted,
    create_graph=vectors_through(lambda net,x: net.linear(x), linear=lambda: nn.Linear(4,3), cls=CreatesGraph, loss=F.cross_entropy),
    two_losses=images(cls=TwoLosses),
    two_steps_per_batch=images(cls=TwoStepsPerBatch),
    unused_parameters=images(model=Branches),
    unused_parameters_of_torch=images(model=Branches, opt_func=adamw_of_torch))

precision = dict(
    overflow=images(cbs=[partial(CPUAmp, init_scale=2.**16, growth_interval=2), lambda: Overflow([1])]),
    fp16=images(cbs=[partial(CPUAmp, torch.float16)], model=linear_classifier),
    bf16=images(cbs=[partial(CPUAmp, torch.bfloat16)]),
    nan_in_the_loss=images(cbs=[lambda: Overflow([1,3])]))

step_cases = dict(
    accumulation_and_clipping=images(cbs=[partial(GradientAccumulation, 32), partial(GradientClip, .1)], n=80),
    clipping_by_the_largest=images(cbs=[partial(GradientClip, .01, norm_type=float('inf'))]),
    own_clipping=images(cbs=[OwnClip]),
    l2=images(opt_func=partial(Adam, wd=.1, decouple_wd=False)),
    adamw=images(opt_func=adamw_of_torch),
    stopped_early=images(cbs=[partial(EarlyStoppingCallback, min_delta=100)]),
    short_epochs=images(cbs=[partial(ShortEpochCallback, .5)]))

all_trainings = architectures | outputs | dtypes_and_layouts | odd_loops | precision | step_cases

@pytest.mark.parametrize('name', all_trainings)
def test_same_bits(name): check_same_bits(all_trainings[name])

# --- options: functions from a folder to callbacks

def median(g): return g.float().abs().median()

options = dict(
    hist=lambda folder: [GradStatsCallback(hist=True)],
    hist_of_all=lambda folder: [GradStatsCallback(hist='all', threshold=.1)],
    extra=lambda folder: [GradStatsCallback(extra=dict(m=median))],
    every=lambda folder: [GradStatsCallback(every=3), GradNormCallback(every=2)],
    keep=lambda folder: [GradStatsCallback('param', keep=2)],
    include=lambda folder: [GradStatsCallback('output', include='0|6')],
    updates=lambda folder: [GradNormCallback(update_every=2, show=True)],
    into_files=lambda folder: [GradStatsCallback(hist=True, folder=folder/'a'), GradNormCallback(folder=folder/'a')],
    two_of_each=lambda folder: both_callbacks()+both_callbacks())

@pytest.mark.parametrize('name', options)
def test_same_bits_with(name, tmp_path):
    "Whatever the callbacks are asked to record."
    check_same_bits(images(epochs=3), lambda: options[name](tmp_path))
