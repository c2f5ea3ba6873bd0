"Cancelled, raised, interrupted: complete steps stay, half ones leave no row, and the next fit is recorded."
import numpy as np,pandas as pd,pytest,torch
from fastai.basics import *
from fastai.callback.all import *
from torch import nn
from fastai_gradstats.engine import Engine
from helpers.callbacks import CtrlC,RaisesAt,cancel_events,cancel_exceptions
from helpers.oracles import GradSpy,check_against_spy
from helpers.training import both_callbacks,fit,image_learner,linear_classifier,step_learner

# --- callbacks that cancel

class Traced(Learner):
    "Notes what really happened"
    def _backward(self): super()._backward(); self.events.append(('backward', self.epoch, self.iter))
    def _step(self): super()._step(); self.events.append(('step', nn.utils.get_total_norm([p.grad for p in self.model.parameters()]).item()))

# Each event once, each exception once more where it belongs; all of the matrix is slow. What a state does with an event needs no Learner
belongs = {CancelBatchException:'before_batch', CancelBackwardException:'before_backward', CancelStepException:'before_step',
           CancelTrainException:'after_batch', CancelEpochException:'after_train', CancelFitException:'after_epoch',
           KeyboardInterrupt:'after_backward', RuntimeError:'after_loss'}
usual = {(event, cancel_exceptions[i%len(cancel_exceptions)], (5,20)[i%2]) for i,event in enumerate(cancel_events)}
usual |= {(event, exc, (20,5)[i%2]) for i,(exc,event) in enumerate(belongs.items())}
cancelled = [pytest.param(event, exc, order, marks=[] if (event, exc, order) in usual else pytest.mark.slow)
             for event in cancel_events for exc in cancel_exceptions for order in (5, 20)]

@pytest.mark.parametrize('event,exc,order', cancelled, ids=lambda o: getattr(o, '__name__', o))
def test_cancel(event, exc, order):
    "Whatever is raised wherever: rows for each backward and step that happened, none else, no hook left, and the next fit works."
    learn = image_learner(linear_classifier, [*both_callbacks(), RaisesAt(exc, event, 1, order)], cls=Traced, n=48, valid=4)
    learn.events = []
    try: fit(learn, 2)
    except (Exception,KeyboardInterrupt) as e: assert isinstance(e, exc)
    assert not any(m._forward_hooks for m in learn.model.modules()) and '_do_epoch_train' not in learn.__dict__
    fit(learn)
    done = [o for o in learn.events if o[0]=='backward']
    steps = [o[1] for o in learn.events if o[0]=='step']
    out = learn.grad_stats.select(kind='output').df
    assert len(out)==len(done)==out['iteration'].nunique()
    assert out['iteration'].is_monotonic_increasing
    s = learn.grad_norm.df
    np.testing.assert_allclose(s.loc[~s['skipped'],'norm'], steps, rtol=1e-5)
    assert s['step'].tolist()==list(range(len(s)))
    par = learn.grad_stats.select(kind='param').df
    read = s.loc[s['norm'].notna(),'step'].tolist()
    assert par['step'].unique().tolist()==read and len(par)==2*len(read)
    assert set(par.loc[par['skipped'],'step'])<=set(s.loc[s['skipped'],'step'])

class StopsFit(Callback):
    def after_epoch(self): raise CancelFitException('enough')

@pytest.mark.parametrize('cb,n',
                         ((lambda: ShortEpochCallback(.5), 6), (lambda: EarlyStoppingCallback(min_delta=100, patience=1), 8),
                          (TerminateOnNaNCallback, 8), (StopsFit, 4)),
                         ids='short early nan stop'.split())
def test_stoppers(cb, n):
    spy = GradSpy()
    learn = fit(image_learner(cbs=[*both_callbacks(), spy, cb()]), 2)
    check_against_spy(learn, spy)
    assert len(learn.grad_norm.norms)==len(learn.grad_stats.stats)==n

# --- exceptions and Ctrl-C

class RaisesWhenTold(nn.Module):
    "Passes its input on; an ordinary exception in forward or backward when told to"
    where = None
    def forward(self, x):
        if self.where=='forward': self.boom()
        if self.where=='backward': x.register_hook(self.boom)
        return x
    def boom(self, *args): raise RuntimeError('test')

class RaisesAfterLoss(Callback):
    def after_loss(self): raise RuntimeError('test')

@pytest.mark.parametrize('where', ('forward','backward','optimizer','callback'))
def test_exception(where):
    "An ordinary exception in the second fit: what was recorded stays as it was, no hook acts or stays, and the next fit is recorded."
    learn = image_learner(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192,20), RaisesWhenTold(), nn.Linear(20,10)), both_callbacks())
    fit(learn)
    before = learn.grad_stats.df,learn.grad_norm.df
    def boom(*args): raise RuntimeError('test')
    if where=='optimizer': learn.opt.step = boom
    elif where!='callback': learn.model[2].where = where
    with pytest.raises(RuntimeError, match='test'): fit(learn, cbs=RaisesAfterLoss() if where=='callback' else None)
    learn.model[2].where = None
    learn.opt.__dict__.pop('step', None)
    assert not any(m._forward_hooks for m in learn.model.modules())
    learn.model(torch.randn(4,3,8,8)).sum().backward()
    learn.opt.zero_grad()
    for f,d in zip(('grad_stats','grad_norm'), before):
        pd.testing.assert_frame_equal(getattr(learn, f).df[:len(d)].astype({'fit':int}), d.astype({'fit':int}), check_categorical=False)
    assert len(learn.grad_stats.df)-len(before[0])==(2 if where=='optimizer' else 0)   # its backward was complete
    spy = GradSpy()
    fit(learn, cbs=spy)
    np.testing.assert_allclose(learn.grad_norm.norms[4:], spy.norms, rtol=1e-5)

class InterruptsWhenTold(nn.Module):
    "Passes its input on, and fails in forward or backward when told to"
    fail = None
    def forward(self, x):
        if self.fail=='forward': raise KeyboardInterrupt
        if self.fail=='backward': x.register_hook(self.boom)
        return x
    def boom(self, g): raise KeyboardInterrupt

@pytest.mark.parametrize('where', ('forward','backward','optimizer'))
def test_interrupt(where):
    "Ctrl-C in the midst of an iteration: complete iterations stay, half ones leave no row."
    learn = image_learner(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192,20), InterruptsWhenTold(), nn.Linear(20,10)), both_callbacks())
    fit(learn)
    n,k = len(learn.grad_stats.df),len(learn.grad_norm.df)
    def boom(*args): raise KeyboardInterrupt
    if where=='optimizer': learn.opt.step = boom
    else: learn.model[2].fail = where
    with pytest.raises(KeyboardInterrupt): fit(learn)
    assert not any(m._forward_hooks for m in learn.model.modules())
    assert len(learn.grad_norm.df)==k
    assert len(learn.grad_stats.df)==n + (2 if where=='optimizer' else 0)   # its backward was complete
    learn.model[2].fail = None
    if where=='optimizer': del learn.opt.step
    fit(learn)
    assert len(learn.grad_norm.df)==2*k and (learn.grad_stats.df.groupby('iteration').size()>=2).all()

def test_fit_after_an_interrupt_is_a_new_one():
    "An interrupt sends no event: fits are counted all the same"
    class Stop(Callback):
        def __init__(self, event): setattr(self, event, self.stop)
        def stop(self): raise KeyboardInterrupt
    learn = step_learner(both_callbacks(), valid=True)
    for event in ('before_validate','after_batch','after_epoch'):
        with pytest.raises(KeyboardInterrupt): fit(learn, cbs=Stop(event))
    fit(learn)
    assert learn.grad_norm.df['fit'].unique().tolist()==[0,1,2,3]

def interrupted_fit(at, monkeypatch):
    "Frames of a fit that is interrupted there, and where that was"
    learn,stop,commit = image_learner(linear_classifier, both_callbacks(), bs=32),CtrlC(at),Engine.commit
    with monkeypatch.context() as m:
        m.setattr(Engine, 'commit', lambda self, note: commit(self, note) or True)   # each step goes to the record
        try:
            with stop: fit(learn)
        except KeyboardInterrupt: pass
    assert torch.is_grad_enabled(), stop.where
    frames = [learn.grad_stats.df, learn.grad_norm.df]
    if len(learn.grad_norm.df): frames.append(learn.grad_norm.by('param'))
    frames = [d.astype({c:object for c in d.select_dtypes('category')}) for d in frames]
    fit(learn)
    assert learn.grad_norm.df['step'].is_monotonic_increasing and learn.grad_stats.df['iteration'].is_monotonic_increasing, stop.where
    return frames,stop

@pytest.mark.parametrize('part', [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, 14))])
def test_interrupt_anywhere(part, monkeypatch):
    "Ctrl-C at any line of ours: what was recorded is a part of what is recorded without it, and each step is whole"
    whole,stop = interrupted_fit(0, monkeypatch)
    assert [len(o) for o in whole]==[6,2,4]
    for at in range(1+3*part, stop.n, 42):
        got,where = interrupted_fit(at, monkeypatch)
        for a,b in zip(got, whole): pd.testing.assert_frame_equal(a, b[:len(a)], check_dtype=len(a)>0, obj=f'{at}, {where.where}: frame')
        assert set(got[0].groupby('iteration').size())<={1,3}, where.where   # a whole backward, or with its step
