"The transaction of a recorder, without a Learner: what each event, cancel, exception and interrupt commits or discards."
import itertools,warnings
import numpy as np,pandas as pd,pytest,torch
from torch import nn
from fastai_gradstats.consumers import NormConsumer,NormOptions,StatsConsumer,StatsOptions
from fastai_gradstats.engine import Engine
from fastai_gradstats.recorder import Batch,Loop,Reader,Transaction
from helpers.callbacks import CtrlC

# --- the states

class CountingTransaction(Transaction):
    "Puts numbers instead of gradients, and writes down what is committed: (what, the numbers of its rows)"
    OUTPUT,PARAM = 0,1
    early_key = 2
    def __init__(self):
        self.engine,self.loop,self.live,self.done,self.n = Engine(),Loop(),True,[],0
    def new_batch(self, epoch): return Batch([])
    def put(self, key):
        self.n += 1
        self.engine.put_all([key], [torch.tensor([float(self.n)])])
    def put_output(self): self.put(self.OUTPUT)
    def put_params(self): self.put(self.PARAM)
    def commit_step(self, skipped): self.commit('skipped' if skipped else 'step', empty=True)
    def commit_outputs(self): self.commit('outputs')
    def commit(self, what, empty=False):
        if not empty and not self.engine.pending(): return
        self.engine.commit(what)
    def is_dropped(self, attempt): return attempt.zeroed and attempt.read_span is not None
    def steps_under_way(self): return 0
    def nothing(self, *args): pass
    check_forward = measure = measure_after = count_samples = rest = nothing
    def note_grads(self, attempt): attempt.zeroed = False

    def committed(self):
        "Of each commit: what it is, outputs and parameters among its rows"
        fetched = self.engine.fetch()
        keys = iter(fetched.keys.tolist())
        rows = [[next(keys) for _ in range(n)] for n in fetched.n]
        return [(note, ks.count(self.OUTPUT), ks.count(self.PARAM)) for note,ks in zip(fetched.notes, rows)]

# words: what happens in a batch, one after the other
def backward(t): t.before_backward(), t.put_output(), t.after_backward()
def cancelled_backward(t): t.before_backward(), t.put_output(), t.cancel(), t.after_backward()
def broken(t): t.before_backward(), t.put_output()                # an exception came out of it
def silent(t): t.put_output()                                     # a loop that sends no events
def read_word(t): t.read()
def step(t): t.optimizer_steps(), t.optimizer_stepped(), t.stepped()
def silent_step(t): t.optimizer_steps(), t.optimizer_stepped()    # nobody says that it is over
def skip(t): t.skip(), t.stepped()
def cleared(t): t.optimizer_cleared()

def expected(words, complete):
    "The rules, in another way: what each batch of these words leaves"
    done,outputs,params,has_read,taken,cancel,began,any_backward,told,zeroed = [],0,0,False,False,False,False,False,False,False
    def over(what):
        nonlocal outputs,params,has_read,taken,cancel,began,any_backward,told,zeroed
        done.append((what, outputs, params))
        outputs,params,has_read,taken,cancel,began,any_backward,told,zeroed = 0,0,False,False,False,False,False,True,False
    for word in words:
        if word in (backward,cancelled_backward,broken):
            if not any_backward:                                  # what waits is of no whole backward
                if taken: over('step')
                outputs,params,has_read = 0,0,False
            told,began,cancel = True,True,word is cancelled_backward
            outputs += 1
            if word is cancelled_backward and any_backward: outputs -= 1   # the complete one stays
            if word is backward: any_backward = True
            if word is cancelled_backward and not any_backward: outputs,params,has_read = 0,0,False
        if word is silent: outputs += 1
        if word is read_word:
            if taken: over('step')
            told,params,has_read,zeroed = True,1,True,False
        if word in (step,silent_step):
            if taken: over('step')
            if not has_read: params,has_read,zeroed = 1,True,False
            taken = True
            if word is step: over('step')
        if word is skip:
            told = True
            if not has_read: params,has_read,zeroed = 1,True,False
            over('step' if taken else 'skipped')
        if word is cleared: zeroed = True
    had = any_backward or complete and not cancel and (began or not told)
    if taken or zeroed and has_read: over('step' if taken else 'skipped')
    else: params = 0
    if had and outputs: done.append(('outputs', outputs, params))
    return done

@pytest.mark.parametrize('complete', (True, False))
@pytest.mark.parametrize('first', (backward,cancelled_backward,silent,read_word,step,skip), ids=lambda f: f.__name__)
def test_every_order_of_events(first, complete):
    "All batches of up to four words: what they commit, and that nothing is left over for the next batch"
    others = backward,cancelled_backward,read_word,step,silent_step,skip,cleared
    n = 0
    for length in range(4):
        for rest in itertools.product(others, repeat=length):
            words = (first, *rest)
            t = CountingTransaction()
            t.begin()
            for word in words: word(t)
            t.end(complete)
            names = ' '.join(w.__name__ for w in words)
            assert t.committed()==expected(words, complete), names
            assert t.batch is None and not t.engine.pending(), names
            n += 1
    assert n==1+7+49+343

# --- a real model, interrupted anywhere

class ByHandLoop(Loop):
    def __init__(self, model, opt): self.model,self.opt = model,opt
    def optimizers(self): return [self.opt]
    def loss(self): return torch.tensor(1.)

def reader_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3,2), nn.Tanh(), nn.Linear(2,1))
    reader = Reader(ByHandLoop(model, torch.optim.SGD(model.parameters(), lr=.1)))
    consumers = StatsConsumer(StatsOptions(), 'stats'),NormConsumer(NormOptions(update_every=1), 'norms')
    for consumer in consumers: reader.join(consumer)
    return model,reader,consumers

def train_by_hand(model, reader, n=2):
    "What a framework that tells everything does"
    reader.fit_begins()
    try:
        reader.guarded('before_train', reader.start)
        for _ in range(n):
            reader.guarded('begin', reader.begin)
            loss = model(torch.ones(2,3)).square().mean()
            reader.guarded('before_backward', reader.before_backward)
            loss.backward()
            reader.guarded('after_backward', reader.after_backward)
            reader.guarded('read', reader.read)
            reader.loop.opt.step()
            reader.guarded('stepped', reader.stepped)
            reader.guarded('end', lambda: reader.end(complete=True))
            reader.loop.opt.zero_grad()
    finally: reader.guarded('the end', reader.stop)

def frames_by_hand(consumers):
    stats,norms = consumers
    stats.flush()   # what is committed may wait
    return stats.record.df,norms.record.steps,norms.record.by('param') if len(norms.record.steps) else norms.record.frame('params')

def interrupted_by_hand(at):
    model,reader,consumers = reader_by_hand()
    stop = CtrlC(at)
    try:
        with stop: train_by_hand(model, reader)
    except KeyboardInterrupt: pass
    return model,reader,consumers,stop

def is_start_of(got, whole):
    if len(got): pd.testing.assert_frame_equal(got, whole[:len(got)], check_categorical=False)

@pytest.mark.parametrize('part', [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, 8))])
def test_interrupt_at_any_line(part):
    "Before the commit a step is lost, after it nothing is; no hook stays; what comes next is recorded"
    *_,consumers,stop = interrupted_by_hand(0)
    whole = frames_by_hand(consumers)
    assert [len(d) for d in whole]==[12,2,8]
    for at in range(1+part*3, stop.n, 24):
        model,reader,consumers,stop_here = interrupted_by_hand(at)
        reader.stop()   # the interrupt may have come in `stop` itself
        for got,want in zip(frames_by_hand(consumers), whole): is_start_of(got, want)
        assert set(consumers[0].record.df.groupby('iteration').size())<={2,6}, stop_here.where
        assert not reader.hooks and not reader.loop.opt._optimizer_step_pre_hooks, stop_here.where
        n = len(consumers[1].record.steps)
        train_by_hand(model, reader)
        assert len(consumers[1].record.steps)==n+2, stop_here.where

class Oops(Exception): pass

@pytest.mark.parametrize('method', 'new_batch check_forward put_params measure commit_step count_samples'.split())
def test_an_error_of_ours(method, monkeypatch):
    "costs the batch under way and a sentence"
    model,reader,consumers = reader_by_hand()
    own,calls = getattr(reader, method),[]
    def fails(*args):
        calls.append(1)
        if len(calls)==1: raise Oops('ours')
        return own(*args)
    monkeypatch.setattr(reader, method, fails)
    with pytest.warns(UserWarning, match='not recorded, .* failed .Oops: ours'): train_by_hand(model, reader, 3)
    steps = consumers[1].record.steps
    assert len(steps)>=2 and steps['norm'].notna().all()
    assert set(consumers[0].record.df.groupby('iteration').size())<={2,6}

def test_numbers_beyond_float32_where_numpy_raises():
    "A norm that float32 cannot hold is recorded as inf, also for who has told numpy to raise"
    model,reader,consumers = reader_by_hand()
    with torch.no_grad():
        for p in model.parameters(): p.fill_(1e-3)
    reader.fit_begins()
    reader.start()
    with np.errstate(all='raise'), warnings.catch_warnings():
        warnings.simplefilter('error')
        reader.begin()
        reader.before_backward()
        for p in model.parameters(): p.grad = torch.full_like(p, 3e38)
        reader.after_backward()
        reader.read()
        reader.stepped()
        reader.end(complete=True)
        reader.stop()
    norms = consumers[1].record
    assert norms.steps['norm'].gt(3e38).all() and len(norms.steps)==1
    assert norms.by('param')['norm'].max()==np.inf
