"""A public fault suite: `python -m benchmarks.faults`, minutes of CPU time, fewer with `--quick`

Small nets are trained, and in mid-training something goes wrong. Every watcher that acts has a training of its own, from the same seed:
which faults raise an alarm, how many steps late, is the layer right and the sample, and how often is there an alarm in a healthy training?"""
import argparse,contextlib,io,itertools,logging,warnings
from dataclasses import dataclass
from typing import NamedTuple
from fastai.basics import *
from fastai.callback.schedule import ParamScheduler,combine_scheds,SchedCos,SchedLin,SchedNo
from fastai.layers import ConvLayer,NormType
from fastai.tabular.model import TabularModel
from fastai_gradstats import GradNormCallback,GradStatsCallback,diagnose
from .alarms import together,watchers
from .end_to_end import race
from .models import NoValid

N,BS = 256,16
EPOCH = N//BS     # steps
CALM = 3          # epochs before anything goes wrong
PATIENCE = 8      # steps after it in which an alarm counts

# --- nets and data

class Sequences(nn.Module):
    "A prediction for a sequence"
    def __init__(self, n_out):
        super().__init__()
        self.lstm,self.head = nn.LSTM(4, 16, batch_first=True),nn.Linear(16, n_out)
    def forward(self, x): return self.head(self.lstm(x)[0][:,-1])

class Attention(nn.Module):
    "The same by attention, with dropout"
    def __init__(self, n_out):
        super().__init__()
        self.embed,self.head = nn.Linear(4, 16),nn.Linear(16, n_out)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, .1, batch_first=True), 1, enable_nested_tensor=False)
    def forward(self, x): return self.head(self.body(self.embed(x)).mean(1))

def mlp(n_out): return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, n_out))
def cnn(n_out, norm_type=None):
    layers = [ConvLayer(ni, nf, stride=stride, norm_type=norm_type) for ni,nf,stride in ((1,8,1), (8,16,2))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, n_out))
def tabular(n_out): return TabularModel([(7,4)], 5, n_out, [24, 12])

class Net(NamedTuple):
    make: object      # function of the number of outputs
    size: tuple       # of an item's numbers
    part: str         # a module inside, to be dead or detached
nets = dict(mlp=Net(mlp, (12,), '0'), cnn=Net(cnn, (1,8,8), '0'), cnn_bn=Net(partial(cnn, norm_type=NormType.Batch), (1,8,8), '0'),
            lstm=Net(Sequences, (6,4), 'lstm'), transformer=Net(Attention, (6,4), 'embed'), tabular=Net(tabular, (5,), 'layers.0'))

class Items:
    "A training set that can be learned, and remembers whether item `watched` was drawn"
    def __init__(self, name, classes, seed):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(N, *nets[name].size, generator=g)
        y = x.flatten(1)@torch.randn(x[0].numel(), 3, generator=g)/x[0].numel()**.5
        y = y.argmax(1) if classes else y[:,0]+.1*torch.randn(N, generator=g)
        inputs = [torch.randint(7, (N,1), generator=g), x] if name=='tabular' else [x]
        self.items,self.watched,self.drawn = list(zip(*inputs, y)),None,False
    def __len__(self): return N
    def __getitem__(self, i):
        self.drawn |= i==self.watched
        return self.items[i]

class Loss:
    "Mean squared error or cross entropy, times a factor"
    def __init__(self, classes):
        self.classes = classes
        self.factor = 1.
    def __call__(self, pred, y, reduction='mean'):
        loss = F.cross_entropy(pred, y, reduction=reduction) if self.classes else F.mse_loss(pred.squeeze(-1), y, reduction=reduction)
        return loss*self.factor

def make_learner(net, seed, cbs=(), classes=False, opt_func=Adam, lr=3e-3, **kwargs):
    set_seed(seed)
    items = Items(net, classes, seed)
    dls = DataLoaders(DataLoader(items, bs=BS, shuffle=True, num_workers=0), DataLoader(items, bs=BS, num_workers=0))
    dls.n_inp = len(items.items[0])-1
    learn = Learner(dls, nets[net].make(3 if classes else 1), loss_func=Loss(classes), opt_func=opt_func, lr=lr, cbs=[NoValid(), *cbs], **kwargs)
    return learn,items

# --- faults

@dataclass
class Fault:
    "What goes wrong: one item of the data for an epoch, or something in the training from a step on"
    spoil: object = None     # item, dataset -> item
    act: object = None       # f(`Injector`) in each step from there on, before the model is called
    after_pred: object = None
    once: bool = False       # in one step only
    classes: bool = False    # of classification, not regression
    silent: bool = False     # no norm can show it: no alarm is expected
    layer: bool = False      # it sits in the layer `Injector.tensor`

def on_input(f):
    "Spoil the numbers that go in"
    return lambda item, items: (*item[:-2], f(item[-2].clone()), item[-1])
def on_target(f): return lambda item, items: (*item[:-1], f(item[-1]))
def with_value(value):
    def put(x):
        x.view(-1)[3] = value
        return x
    return put

def raise_lr(o):
    for h in o.learn.opt.hypers: h['lr'] = 1000*o.learn.lr
def scale_loss(o): o.learn.loss_func.factor = 1000.
def layer_grad(factor): return lambda o: o.hooks.append(dict(o.learn.model.named_parameters())[o.tensor].register_hook(lambda g: g*factor))
def change_output(f):
    "The output of a part inside the net, in each step from here on"
    def change(module, args, out): return (f(out[0]), *out[1:]) if isinstance(out, tuple) else f(out)
    return lambda o: o.hooks.append(o.learn.model.get_submodule(nets[o.net].part).register_forward_hook(change))
def overflow(o): o.hooks.append(o.learn.pred.register_hook(lambda g: (g*2.**40).half().float()/2**40))

faults = {
    'wrong label, large logit': Fault(lambda item, items: (*item[:-2], 10*item[-2], (item[-1]+1)%3), classes=True),
    'target off by 1000': Fault(on_target(lambda y: y+1000)),
    'one number x 1000': Fault(on_input(with_value(1000.))),
    'NaN in input': Fault(on_input(with_value(math.nan))),
    'inf in input': Fault(on_input(with_value(math.inf))),
    'NaN in target': Fault(on_target(lambda y: y*math.nan)),
    'inf in target': Fault(on_target(lambda y: y*0+math.inf)),
    'learning rate x 1000': Fault(act=raise_lr),
    'loss x 1000': Fault(act=scale_loss),
    'fp16 overflow': Fault(after_pred=overflow, once=True),
    'gradient of a layer x 1000': Fault(act=layer_grad(1000.), once=True, layer=True),
    'NaN in gradient of a layer': Fault(act=layer_grad(math.nan), once=True, layer=True),
    'duplicated row': Fault(lambda item, items: items[0], silent=True),
    'dead layer': Fault(act=change_output(lambda x: x*0), silent=True),
    'detached part': Fault(act=change_output(lambda x: x.detach()), silent=True)}

class Injector(Callback):
    "Lets the fault happen; `at` is its step"
    order = -60
    def __init__(self, net, fault, seed, items, alarms=None, patience=PATIENCE):
        self.net,self.fault,self.items,self.alarms,self.patience = net,fault,items,alarms,patience
        self.step = CALM*EPOCH+(5*seed+2)%EPOCH
        self.item = (37*seed+11)%N
        self.at,self.was,self.tensor,self.hooks = None,None,None,[]

    def before_fit(self):
        weights = [n for n,p in self.model.named_parameters() if p.ndim>1]
        self.tensor = weights[self.step%len(weights)]

    def before_epoch(self):
        items,i = self.items,self.item
        if self.fault.spoil is None: return
        if self.epoch==CALM:
            self.was = items.items[i]
            items.items[i],items.watched,items.drawn = self.fault.spoil(self.was, items.items),i,False
        else: self.restore()

    def restore(self):
        "The data are as they were"
        if self.was is not None: self.items.items[self.item],self.items.watched,self.was = self.was,None,None

    def before_batch(self):
        if self.fault.spoil is not None:
            if self.at is None and self.items.drawn: self.at = self.train_iter
        elif self.train_iter==self.step: self.at = self.step
        if self.is_on and self.fault.act: self.fault.act(self)

    @property
    def is_on(self): return self.at is not None and not (self.fault.once and self.train_iter>self.at)
    def after_pred(self):
        if self.is_on and self.fault.after_pred: self.fault.after_pred(self)

    def after_batch(self):
        self.release()
        if self.at is None: return
        all_know = self.alarms and all(found and found[-1].step>=self.at for found in self.alarms.values())
        if all_know or self.train_iter>self.at+self.patience: raise CancelFitException()
    def release(self):
        for h in self.hooks: h.remove()
        self.hooks.clear()
    def after_fit(self):
        self.release()
        self.restore()

@contextlib.contextmanager
def quiet():
    "Nobody says anything: alarms are noted"
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally: logging.disable(logging.NOTSET)

def fit(learn, epochs, *cbs):
    with quiet(), learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=cbs)

def watched(names, train)->dict: # name -> alarms, and what `train` returns
    "Train once with the callbacks of these watchers"
    alarms = {name:[] for name in names}
    cbs = [watchers[name](alarms[name]) for name in names]
    try: res = train(cbs, alarms)
    finally:
        for cb in cbs:
            if hasattr(cb, 'close'): cb.close()
    return alarms,res

def faulty(names, net, title, seed)->dict: # name of a watcher -> what it made of it
    "One training with a fault"
    fault = faults[title]
    def train(cbs, alarms):
        learn,items = make_learner(net, seed, cbs, fault.classes)
        injector = Injector(net, fault, seed, items, alarms)
        fit(learn, CALM+2, injector)
        return injector
    alarms,injector = watched(names, train)
    return {name:verdict(fault, injector, found) for name,found in alarms.items()}

def verdict(fault, injector, alarms)->dict:
    "Was there an alarm before the fault, and after it; how late, and with the right layer and sample?"
    at,module = injector.at,injector.tensor.rpartition('.')[0]
    alarms = [a for a in alarms if a.step<=at+PATIENCE]
    after = [a for a in alarms if a.step>=at]
    res = dict(early=len(after)<len(alarms), detected=bool(after), delay=after[0].step-at if after else math.nan)
    if fault.layer: res['layer'] = bool(after) and after[0].layer in (injector.tensor, module)
    if fault.spoil and not fault.silent: res['sample'] = bool(after) and after[0].item==injector.item
    return res

# --- healthy trainings

class Unfreezes(Callback):
    def before_fit(self): self.learn.freeze()
    def before_epoch(self):
        if self.epoch==self.n_epoch//2: self.learn.unfreeze()

def halves(model):
    "Two groups of parameters"
    params = list(model.parameters())
    return [params[:-2], params[-2:]]

healthy = {   # title -> arguments of the Learner, and a function of the peak learning rate that makes a schedule
    'Adam': (dict(), None),
    'SGD, one cycle': (dict(opt_func=partial(SGD, mom=.9), lr=.03), lambda lr: combine_scheds([.25,.75], [SchedCos(lr/25, lr), SchedCos(lr, lr/1e5)])),
    'AdamW, cosine': (dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)), lambda lr: SchedCos(lr, 0)),
    'RMSProp': (dict(opt_func=RMSProp, lr=1e-3), None),
    'long warm-up': (dict(lr=.01), lambda lr: combine_scheds([.6,.4], [SchedLin(lr/1e4, lr), SchedNo(lr, lr)])),
    'unfreezing': (dict(splitter=halves), None)}

def healthy_run(names, net, title, seed, epochs)->dict: # name of a watcher -> was there an alarm?
    kwargs,schedule = healthy[title]
    def train(cbs, alarms):
        learn,_ = make_learner(net, seed, cbs, **kwargs)
        extra = [Unfreezes()] if title=='unfreezing' else []
        if schedule: extra.append(ParamScheduler(dict(lr=schedule(learn.lr))))
        fit(learn, epochs, *extra)
    alarms,_ = watched(names, train)
    return {name:dict(early=bool(found)) for name,found in alarms.items()}

# --- tables

columns = ['early','detected','layer','sample']   # in how many runs; `early`: an alarm before there was a fault, or without one

def row(group, watcher, net, case, runs)->dict:
    d = pd.DataFrame(runs).reindex(columns=[*columns,'delay']).astype(float)
    sums = {c:d[c].sum() if d[c].notna().any() else math.nan for c in columns}
    return dict(group=group, watcher=watcher, net=net, case=case, runs=len(d)) | sums | dict(delay=d['delay'].median(), longest=d['delay'].max())

def rows_of(names, group, net, case, runs):
    "A row per watcher from runs with all of them"
    return [row(group, name, net, case, [run[name] for run in runs]) for name in names]

def cannot(names, net)->dict: # name -> why it cannot be had here, or cannot train this net
    why = {}
    for name in names:
        try: watched([name], lambda cbs, alarms: fit(make_learner(net, 0, cbs)[0], 1))
        except Exception as e: why[name] = ' '.join(f'{type(e).__name__}: {e}'.split())[:200]
    return why

def table(seeds=1, names=tuple(nets), cases=tuple(faults), healthy_cases=tuple(healthy), healthy_seeds=1, epochs=8, together=together)->pd.DataFrame:
    "A row per watcher, net and case"
    rows = []
    for group,net in itertools.product(together, names):
        why = cannot(group, net)
        rows += [dict(group='missing', watcher=name, net=net, note=note) for name,note in why.items()]
        who = [name for name in group if name not in why]
        if not who: continue
        for case in cases:
            runs = [faulty(who, net, case, seed) for seed in range(seeds)]
            rows += rows_of(who, 'silent' if faults[case].silent else 'fault', net, case, runs)
        for case in healthy_cases:
            runs = [healthy_run(who, net, case, 100+seed, epochs) for seed in range(healthy_seeds)]
            rows += rows_of(who, 'healthy', net, case, runs)
    return pd.DataFrame(rows)

def said(name, title=None, seed=0)->set:
    "Rules of `diagnose` that have something to say after two epochs with the fault"
    learn,items = make_learner(name, seed, [GradStatsCallback(), GradNormCallback()])
    injectors = [] if title is None else [Injector(name, faults[title], seed, items, patience=2*EPOCH)]
    fit(learn, CALM+3, *injectors)
    with quiet(): found = diagnose(learn)
    return set(found.loc[found['severity'].isin(['error','warning','note']),'rule'])

def diagnoses(names=tuple(nets))->pd.DataFrame:
    "What `diagnose` says of faults that no norm shows, and not of the healthy training"
    rows = []
    for name in names:
        calm = said(name)
        rows += [dict(net=name, fault=title, rules=', '.join(sorted(said(name, title)-calm))) for title,f in faults.items() if f.silent]
    return pd.DataFrame(rows)

def costs(rounds=9, steps=8, models=('convnet','resnet18'))->pd.DataFrame:
    "CPU time of a step over that of the bare loop, interleaved"
    cbs = {name:partial(lambda f: [f([])], f) for name,f in watchers.items()}
    with quiet(): return pd.concat([race(m, threads=(1,), rounds=rounds, steps=steps if m=='convnet' else 1, cbs=cbs) for m in models])

def tables(quick, seeds):
    "name -> function that measures it"
    small = ('mlp','cnn_bn')
    if quick: return dict(faults=lambda: table(names=small, healthy_cases=('Adam','long warm-up'), epochs=6), faults_diagnose=lambda: diagnoses(small),
                          faults_cost=lambda: costs(1, 2, ('convnet',)))
    return dict(faults=lambda: table(seeds, healthy_seeds=seeds), faults_diagnose=diagnoses, faults_cost=costs)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--quick', action='store_true', help='one seed on two nets; nothing is written unless --out is given')
    p.add_argument('--seeds', type=int, default=3, help='trainings per net and case (default: 3)')
    p.add_argument('--only', nargs='*', help=f"only these tables: {', '.join(tables(True, 1))}")
    p.add_argument('--out', help='folder for the tables (default: docs/benchmarks)')
    a = p.parse_args()
    out = a.out or (None if a.quick else Path(__file__).parents[1]/'docs/benchmarks')
    for name,measure in tables(a.quick, a.seeds).items():
        if a.only and name not in a.only: continue
        d = measure()
        print(f'\n{name}\n{d.round(3).to_string(index=False)}', flush=True)
        if out: d.to_csv(Path(out)/f'{name}.csv', index=False, float_format='%.5g')
