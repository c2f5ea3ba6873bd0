"The benchmarks run, and what they count on the device path is as promised. No times are asserted."
import operator,sys
from collections import Counter
from functools import partial
import pandas as pd
import pytest
import torch
from fastai.basics import Callback,OptimWrapper,SGD
from torch import nn
from helpers.project import ROOT,run_command
sys.path.insert(0, str(ROOT))
from benchmarks import counts,curves,end_to_end,faults,peers,share,writing
from benchmarks.models import images,learner

def flat_net(n): return lambda: nn.Sequential(nn.Flatten(), *(nn.Linear(48, 48) for _ in range(n)))
small_batch = partial(images, 2, 4)
default = {k:f for k,f in peers.ours.items() if k in ('norm','param','output','both')}
each_default = pytest.mark.parametrize('name', default)

class Looks(Callback):
    "What everybody does: a number from the device for every parameter"
    def before_step(self): self.got = [p.grad.norm().cpu() for p in self.model.parameters()]

def test_reads_are_counted():
    assert counts.device_step(flat_net(3), small_batch, [Looks()]).reads==6
    assert counts.device_step(flat_net(3), small_batch, []).reads==0
    class Item(Callback):
        def before_step(self): next(self.model.parameters()).grad.sum().item()
    for d in ('cuda','meta'):
        with pytest.raises(Exception, match='item|_local_scalar_dense|meta tensors'): counts.device_step(flat_net(3), small_batch, [Item()], d)

@each_default
def test_no_host_reads(name):
    "And there is something that is read: without work for the device this would say nothing"
    ops,bare = (counts.device_step(flat_net(3), small_batch, cbs) for cbs in (default[name](), []))
    assert ops.reads==0 and ops.work>bare.work+20

@each_default
def test_no_looks_at_numbers_that_are_not_there(name): assert counts.device_step(flat_net(3), small_batch, default[name](), 'meta').reads==0

def test_output_gradients_are_work_on_a_device():
    "In one go, however many there are, but for a copy to the scratch, a look in forward and what shapes need of each"
    few,many = (counts.device_step(flat_net(n), small_batch, default['output']()).work-counts.device_step(flat_net(n), small_batch, []).work for n in (4,40))
    assert 0<few and (many-few)/36<=4

@pytest.mark.parametrize('name', [pytest.param('norm', marks=pytest.mark.slow), 'param'])
def test_constant_work(name):
    "The device gets as much to do for 80 parameters as for 8"
    a,b = (counts.device_step(flat_net(n), small_batch, default[name]()).work - counts.device_step(flat_net(n), small_batch, []).work for n in (4,40))
    assert a==b>0

def test_share():
    d = share.share('linear', rounds=1, steps=2, only=['norm','both','ActivationStats'])
    assert list(d['callbacks'])==['norm','both','ActivationStats']
    assert (d['share %']>0).all() and (d['calls']>0).all()

def test_clock_counts_nested_calls_once():
    c = share.Clock()
    inner = c.wrap(lambda: sum(range(100_000)))
    c.wrap(lambda: inner())()
    assert c.calls==1
    inner()
    assert c.calls==2

def test_exempt_time_does_not_count():
    "Neither in it nor in what it calls, and the clock goes on afterwards"
    c = share.Clock()
    states = []
    def look(): states.append(c.since is not None)
    def outer():
        look()
        c.exempt(look)()
        look()
    c.wrap(outer)()
    look()
    assert states==[True,False,True,False] and c.calls==1
    with pytest.raises(ZeroDivisionError): c.wrap(c.exempt(lambda: 1/0))()
    assert c.since is None

class Unseen:
    "Functions of ours that run while a clock stands, and functions of others that run in its time"
    def __init__(self, clock):
        self.clock,self.package = clock,str(ROOT/'fastai_gradstats')
        self.missed,self.timed_steps = Counter(),0
    def look(self, frame, event, arg):
        if event!='call': return
        code,runs = frame.f_code,self.clock.since is not None
        if code.co_filename.startswith(self.package) and not runs: self.missed[code.co_qualname] += 1
        if code.co_name=='sgd_step' and runs: self.timed_steps += 1

@pytest.mark.parametrize('opt_func', [SGD, partial(OptimWrapper, opt=torch.optim.SGD)])
@pytest.mark.parametrize('cbs', [default['norm'], default['both'], peers.ours['norm, alert'], peers.ours['both, every=10'], lambda: [*peers.both(), Looks()]])
def test_nothing_of_ours_is_missed(cbs, opt_func):
    "While a step runs, each Python function of ours runs on the clock, and the optimizer's does not"
    l = learner('linear', 3, cbs())
    l.opt_func = opt_func
    clock,steps = share.Clock(),[]
    unseen = Unseen(clock)
    class Profiled(Callback):
        order = -2000
        def before_epoch(self): sys.setprofile(unseen.look)
        def after_epoch(self): sys.setprofile(None)
    l.add_cb(Profiled())
    with share.watch(clock, steps), l.no_bar(), l.no_logging():
        try: l.fit(1)
        finally: sys.setprofile(None)
    # what is left is shorter than the clock's own reading
    passes_on = {'MethodWatch.__init__.<locals>.method', 'StepWatch.before_hook', '_with_told_closure', 'StepWatch.use_hooks.<locals>.<lambda>', '_Guard.__call__', '_Guard.remove', 'MethodWatch.original'}
    assert set(unseen.missed)<=passes_on
    assert not unseen.timed_steps
    assert all(0<ours<t for t,ours,_ in steps)

def test_watch_leaves_nothing():
    places = list(share.replaced(share.Clock(), []))
    def state(): return [getattr(*o) for o in places]
    before = state()
    with pytest.raises(ZeroDivisionError), share.watch(share.Clock(), []): 1/0
    assert state()==before
    with share.watch(share.Clock(), []): assert not any(map(operator.is_, state(), before))

def test_race():
    "A peer that raises is a row that says so"
    class Bad(Callback):
        def before_step(self): raise ValueError('no such thing')
    def missing(): raise ImportError('not installed')
    d = end_to_end.race('linear', threads=(1,), rounds=2, steps=2, cbs={'both':peers.both, 'bad':lambda: [Bad()], 'missing':missing}).set_index('callbacks')
    assert list(d.index)==['bare','bare, again','both','bad','missing']
    assert d.loc['bare','cpu']==1 and (d.loc[['bare','both'],['cpu','wall']]>0).all(axis=None)
    assert 'no such thing' in d.loc['bad','note'] and 'not installed' in d.loc['missing','note']

@pytest.mark.slow
def test_kept():
    d = counts.kept('linear', steps=5).set_index('callbacks')
    assert d.loc['both','tensors']==4+2
    assert d.loc["thread's hook",'bytes_per_step']>=8*8*(16+10)

def test_bounded():
    d = counts.bounded(20_000, tensors=5, keep=100)
    assert (d['kept']<=100).all()
    assert d['peak_mb'].iloc[-1]<d['peak_mb'].iloc[0]*1.2

def test_writing():
    d = writing.writing('linear', rounds=1, steps=2).loc[0]
    assert d['iterations a part']==500 and d['bytes']>500*(6+4+1)*16
    assert d['cpu %']==pytest.approx(d['write cpu ms']/d['step cpu ms']/5)

def test_curves():
    assert [x for _,x,*_ in curves.recorded(20, 2)]==[10,20]
    assert [x for _,x,*_ in curves.every('linear', (1,2), 5)]==[1,2]

def test_fault_suite():
    "What is in the table is what happened: a target far off, a copy of a row, and nothing at all"
    who = [['GradAlert'],['TerminateOnNaN','norm by hand']]
    d = faults.table(names=('mlp',), cases=('target off by 1000','NaN in target','duplicated row'), healthy_cases=('Adam',), epochs=2, together=who)
    d = d.set_index(['watcher','case'])
    assert (d['runs']==1).all() and not d['early'].any()
    for case,found in {('GradAlert','target off by 1000'):1, ('TerminateOnNaN','target off by 1000'):0, ('norm by hand','target off by 1000'):1, ('GradAlert','NaN in target'):1,
                       ('TerminateOnNaN','NaN in target'):1, ('GradAlert','duplicated row'):0, ('norm by hand','duplicated row'):0}.items(): assert d.loc[case,'detected']==found, case
    assert d.loc[('GradAlert','target off by 1000'),['sample','delay']].tolist()==[1,0] and d.loc[('norm by hand','target off by 1000'),'sample']==0

def test_a_watcher_that_is_not_installed(monkeypatch):
    def absent(alarms): raise ImportError('no such package')
    monkeypatch.setitem(faults.watchers, 'absent', absent)
    d = faults.table(names=('mlp',), cases=(), healthy_cases=(), together=[['absent']])
    assert d['group'].tolist()==['missing'] and 'no such package' in d['note'][0]

def test_faults_happen_where_they_should():
    "The item that is spoiled comes in the step that is noted, once, and is whole again afterwards"
    learn,items = faults.make_learner('mlp', 0)
    whole = items.items[11]
    injector = faults.Injector('mlp', faults.faults['target off by 1000'], 0, items)
    losses = []
    class Losses(Callback):
        def after_loss(self): losses.append(self.learn.loss.item())
    faults.fit(learn, faults.CALM+2, injector, Losses())
    assert losses.index(max(losses))==injector.at and faults.CALM*faults.EPOCH<=injector.at<(faults.CALM+1)*faults.EPOCH
    assert sum(loss>1000 for loss in losses)==1 and injector.item==11
    assert items.items[11] is whole

@pytest.mark.battery
def test_main(tmp_path):
    run_command(sys.executable, '-W', 'ignore', '-m', 'benchmarks', '--only', 'machine', 'bounded', '--out', str(tmp_path), cwd=ROOT)
    assert set(pd.read_csv(tmp_path/'machine.csv')['what'])>={'date','cpu','cores','torch'}
    text = (tmp_path/'README.md').read_text()
    assert '| iterations | kept | peak_mb |' in text and '## Share' not in text
