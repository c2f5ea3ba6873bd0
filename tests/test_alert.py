"Steps out of line: judged, caught, acted on; training is otherwise the same."
import pytest
from fastai.basics import *
import fastai.callback.schedule
from fastai.callback.mixup import CutMix,MixUp
from fastai.callback.training import GradientAccumulation,GradientClip
from torch import nn
from fastai_gradstats import alert,GradAlert,GradNormCallback,GradStatsCallback,diagnose,save_report
from fastai_gradstats.alert import NormWatch
from fastai_gradstats.engine import Engine
from helpers.faulty import BS,N,bn_cnn,faulty_learner,faulty_nets
from helpers.training import fit,warned

def steps_out_of_line(norms, **kwargs):
    watch = NormWatch(**kwargs)
    return [i for i,norm in enumerate(norms) if watch.judge(float(norm))]

def copied_weights(learn): return [p.detach().clone() for p in learn.model.parameters()]
def same(a, b): return all(torch.equal(x, y) for x,y in zip(a, b, strict=True))

# --- the judge alone

t = np.arange(2000)
shapes = dict(flat=0*t, warm_up=np.log(np.minimum(1, (t+1)/300)), decay=-t/400, falls=-3*np.minimum(1, t/30), cosine=np.cos(t/2000*np.pi),
              one_cycle=2*np.sin(t/2000*np.pi)**2-3*(t/2000)**2, plateau=3.1/(1+np.exp(-(t-700)/8)), drops=-2.3*(t>1000)-2.3*(t>1500), waves=.8*np.sin(t/7), first_of_epoch=.7*(t%40<1))
def noise_of(kind, rng):
    z = rng.standard_normal(len(t))
    if kind=='bumps': return .3*z+(rng.random(len(t))<.05)
    if kind=='heavy': return np.log(np.abs(rng.standard_t(3, len(t))))
    if kind=='slow': return np.convolve(z, .95**np.arange(60), 'full')[:len(t)]*.1
    return kind*z

@pytest.mark.parametrize('kind', [.05, .2, .4, .6, 'bumps', 'slow', 'heavy'])
def test_healthy_norms_are_in_line(kind):
    "50 runs of 2,000 steps: each shape five times"
    for shape in shapes.values():
        for seed in range(5): assert not steps_out_of_line(np.exp(shape+noise_of(kind, np.random.default_rng(seed))))

@pytest.mark.parametrize('shape', shapes)
def test_spikes_are_found_at_once(shape):
    norms = np.exp(shapes[shape]+.15*np.random.default_rng(0).standard_normal(len(t)))
    calm = 20 if shape in ('flat','decay','cosine','one_cycle','plateau','drops') else 300   # where the level itself moves, spread is wide at first
    times = 200 if shape=='waves' else 12
    for i in (calm, 500, 1300, 1900):
        watch = NormWatch()
        assert not any(watch.judge(o) for o in norms[:i])
        assert watch.judge(times*max(norms[i-5:i].max(), watch.usual))=='spike'

@pytest.mark.parametrize('level', [1., 1e-6, 300., -2.])
@pytest.mark.parametrize('calm', [20, 300])
def test_where_the_loss_is_calm_a_spike_is_three_times_as_high(level, calm):
    rng = np.random.default_rng(0)
    norms,losses = np.exp(.1*rng.standard_normal(calm)),level*(1+.1*rng.random(calm))
    def judged(times, loss):
        watch = NormWatch()
        assert not any(watch.judge(*o) for o in zip(norms, losses))
        return watch.judge(times*norms[-5:].max(), loss)
    highest = losses[-5:].max()
    quiet,loud = highest+.9*abs(highest),highest+1.1*abs(highest)
    assert [judged(20, loss) for loss in (level, quiet, loud, None)]==[None, None, 'spike', 'spike']
    assert [judged(40, loss) for loss in (level, quiet, loud, None)]==['spike']*4
    assert judged(40, math.nan)=='nonfinite'

def test_a_spike_is_no_part_of_what_is_usual():
    norms = np.exp(.2*np.random.default_rng(0).standard_normal(1000))
    norms[30::25] *= 100
    assert steps_out_of_line(norms)==[*range(30, 1000, 25)]

def test_a_new_level_becomes_usual():
    norms = np.exp(.2*np.random.default_rng(0).standard_normal(1000))
    norms[500:] *= 50
    assert steps_out_of_line(norms)==[500,501,502,503]

def test_what_is_not_finite_is_out_of_line_from_the_first_step():
    for bad in (np.nan, np.inf): assert NormWatch().judge(bad, 1.)==NormWatch().judge(1., bad)=='nonfinite'
    assert NormWatch().judge(1., None) is None

def test_norms_of_zero_are_no_scale():
    assert not steps_out_of_line([0.]*100+[1.]*100)

# --- the right sample and tensor

def largest_tensor(learn, iteration):
    rows = learn.grad_norm.by('param')
    rows = rows[rows['iteration']==iteration]
    return rows.loc[rows['norm'].idxmax(),'name']

def finds(kind, seed):
    "Were the sample and the tensor of the first incident right?"
    poison = (37*seed+11)%N
    learn = faulty_learner(kind, seed, cbs=[GradNormCallback(), GradAlert(action='skip')], poison=poison)
    fit(learn, 3)
    assert learn.grad_alert.count
    o = learn.grad_alert.incidents[0]
    return o.samples['item'][0]==poison and o.samples['share'][0]>.5 and o.exact, o.tensors['name'][0]==largest_tensor(learn, o.iteration)

few_nets = pytest.mark.parametrize('kind', [pytest.param(kind, marks=() if kind in ('mlp','cnn') else pytest.mark.slow) for kind in faulty_nets])

@pytest.mark.filterwarnings('ignore:GradAlert')
@pytest.mark.parametrize('kind', faulty_nets)
def test_sample_and_tensor(kind):
    for seed in range(2): assert finds(kind, seed)==(True,True)

@pytest.mark.battery
@pytest.mark.filterwarnings('ignore:GradAlert')
@pytest.mark.parametrize('kind', faulty_nets)
def test_sample_and_tensor_in_fifty_runs(kind):
    found = np.array([finds(kind, seed) for seed in range(50)])
    print(f'{kind}: right sample in {found[:,0].sum()}, right tensor in {found[:,1].sum()} of 50')
    assert (found.mean(0)>=.95).all(), found.mean(0)

@pytest.mark.filterwarnings('ignore:GradAlert')
@pytest.mark.parametrize('kind', ['mlp','cnn','lstm'])
def test_the_sample_with_a_nan(kind):
    learn = faulty_learner(kind, cbs=[GradAlert(action='skip')])
    items = learn.dls.train.dataset
    x,y = items[77]
    items[77] = (torch.where(torch.arange(x.numel()).view(x.shape)==3, math.nan, x), y)
    fit(learn, 2)
    found = learn.grad_alert.incidents
    assert len(found)==2 and all(o.reason=='nonfinite' and o.samples['item'][0]==77 for o in found)
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())

@pytest.mark.battery
@pytest.mark.parametrize('kind', faulty_nets)
@pytest.mark.parametrize('opt_func,lr', [(Adam,1e-3),(SGD,1e-3),(partial(OptimWrapper, opt=torch.optim.AdamW),3e-3)], ids=['adam','sgd','adamw'])
def test_healthy_training_is_in_line(kind, opt_func, lr):
    for seed in range(4):
        learn = faulty_learner(kind, seed, cbs=[GradAlert(samples=False)], opt_func=opt_func, lr=lr)
        with learn.no_bar(), learn.no_logging():
            if seed%2: learn.fit(125)
            else: learn.fit_one_cycle(125, lr)
        assert not learn.grad_alert.count, [str(o) for o in learn.grad_alert.incidents]

# --- nothing else changes

@pytest.mark.filterwarnings('ignore:GradAlert')
@few_nets
def test_a_watched_training_is_the_same(kind):
    "Bit for bit, without an incident and with one that only warns"
    for poison in (None, 130):
        def trained(*cbs):
            learn = fit(faulty_learner(kind, poison=poison, cbs=cbs), 2)
            return learn,[*copied_weights(learn), *learn.model.buffers(), torch.get_rng_state(), torch.tensor([random.random(), np.random.rand()])]
        _,bare = trained()
        learn,watched = trained(GradAlert())
        assert same(bare, watched)
        assert bool(learn.grad_alert.count)==(poison is not None)

class LeavesOut(Callback):
    "Leaves out these steps, by hand"
    order = 10.9
    def __init__(self, steps): self.steps,self.n = steps,-1
    def before_step(self):
        self.n += 1
        if self.n in self.steps: raise CancelStepException("by hand")

@pytest.mark.filterwarnings('ignore:GradAlert')
@few_nets
def test_a_skipped_step_is_a_step_left_out(kind):
    learn = fit(faulty_learner(kind, poison=130, cbs=[GradNormCallback(), GradStatsCallback(), GradAlert(action='skip')]), 2)
    steps = learn.grad_norm.steps
    skipped = steps.loc[steps['skipped'],'step'].tolist()
    assert skipped==[o.step for o in learn.grad_alert.incidents]!=[]
    by_hand = fit(faulty_learner(kind, poison=130, cbs=[LeavesOut(skipped)]), 2)
    assert same(copied_weights(learn), copied_weights(by_hand))
    assert steps.loc[steps['skipped'],'norm'].tolist()==pytest.approx([o.norm for o in learn.grad_alert.incidents])
    df = learn.grad_stats.df
    assert set(df.loc[df['skipped'],'step'])==set(skipped) and set(df.loc[df['skipped'],'kind'])=={'output','param'}
    assert learn.opt.param_lists[0][0].grad.abs().sum()==0

@pytest.mark.filterwarnings('ignore:GradAlert')
def test_stop_ends_the_fit_and_the_next_one_starts_clean():
    cbs = [GradNormCallback(), GradAlert(action='stop')]
    learn = fit(faulty_learner('mlp', poison=130, cbs=cbs), 3)
    o = learn.grad_alert.incidents[0]
    assert len(learn.grad_norm.norms)==o.step+1 and learn.grad_norm.steps['skipped'].iloc[-1]
    assert all(p.grad.abs().sum()==0 for p in learn.model.parameters())
    learn.dls.train.dataset[130] = learn.dls.train.dataset[131]
    fit(learn, 1)
    assert learn.grad_alert.count==1 and len(learn.grad_norm.norms)==o.step+1+N//BS

def test_gradients_are_read_once(monkeypatch):
    "Beside GradNormCallback nothing is read for the alert"
    def reads(*cbs):
        n = []
        put_all = Engine.put_all
        with monkeypatch.context() as m:
            m.setattr(Engine, 'put_all', lambda self, keys, *args, **kw: (n.append(len(keys)), put_all(self, keys, *args, **kw))[1])
            fit(faulty_learner('mlp', cbs=cbs))
        return sum(n)
    params = len([*faulty_nets['mlp']().parameters()])
    assert reads(GradAlert())==reads(GradNormCallback())==reads(GradNormCallback(), GradAlert())==reads(GradStatsCallback(kind='param'), GradAlert())==params*N//BS

def test_norms_beside_the_alert_are_the_same():
    alone,beside = (fit(faulty_learner('cnn', cbs=cbs)) for cbs in ([GradNormCallback()], [GradNormCallback(), GradAlert()]))
    assert alone.grad_norm.df.equals(beside.grad_norm.df) and alone.grad_norm.by('param').equals(beside.grad_norm.by('param'))

def test_norm_is_that_before_clipping():
    learn = fit(faulty_learner('mlp', poison=130, cbs=[GradNormCallback(), GradientClip(.1), GradAlert(action=lambda o: None)]), 1)
    assert learn.grad_alert.incidents[0].norm==pytest.approx(max(learn.grad_norm.norms)) and max(learn.grad_norm.norms)>1

# --- actions

@pytest.mark.parametrize('found,done', [('skip','skip'), ('warn','warn'), (None,'warn'), ('no','warn'), (ZeroDivisionError('x'),'warn')])
def test_an_action_of_ones_own(found, done):
    def action(incident):
        if isinstance(found, Exception): raise found
        return found
    with warned() as said: learn = fit(faulty_learner('mlp', poison=130, cbs=[GradNormCallback(), GradAlert(action=action)]))
    assert learn.grad_alert.incidents[0].action==done
    assert bool(learn.grad_norm.steps['skipped'].any())==(done=='skip')
    about = [s for s in said if 'action' in s]
    assert len(about)==(found=='no' or isinstance(found, Exception))

@pytest.mark.parametrize('kwargs,name', [(dict(factor=1),'factor'), (dict(factor='x'),'factor'), (dict(window=0),'window'), (dict(action='no'),'action'), (dict(keep=0),'keep'), (dict(samples='x'),'samples')])
def test_wrong_arguments(kwargs, name):
    with pytest.raises(ValueError, match=f'^{name}:'): GradAlert(**kwargs)

@pytest.mark.filterwarnings('ignore:GradAlert')
def test_accumulation():
    "The group is the step, and the sample is sought in all its batches"
    learn = fit(faulty_learner('mlp', poison=130, bs=8, cbs=[GradNormCallback(), GradientAccumulation(32), GradAlert(action='skip')]), 3)
    for o in learn.grad_alert.incidents:
        assert o.batches==4==len(o.batch) and o.exact and o.samples['item'][0]==130
        assert o.batch[o.samples['batch'][0]][1][o.samples['place'][0]]>900
    assert learn.grad_norm.steps['skipped'].sum()==learn.grad_alert.count>0

@pytest.mark.filterwarnings('ignore:GradAlert')
@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_batches(mix):
    "The loss of pairs: the place is right, also of its partner"
    set_seed(0)
    items = L(zip(torch.randn(N,1,8,8), torch.arange(N)%3))
    model = bn_cnn()
    model[-1] = nn.Linear(16,3)
    learn = Learner(DataLoaders(DataLoader(items, bs=BS, shuffle=True), DataLoader(items[:8], bs=8)), model, loss_func=CrossEntropyLossFlat(), cbs=[GradAlert(action='skip'), mix(1.)])
    fit(learn, 1)
    assert not learn.grad_alert.count
    items[130] = items[130][0]*math.nan,items[130][1]
    fit(learn, 1)
    o = learn.grad_alert.incidents[0]
    x,_ = o.batch
    broken = torch.isnan(x).flatten(1).any(1).nonzero().flatten().tolist()
    assert o.exact and sorted(o.samples['place'])==broken

# --- where training is not

def test_lr_find_and_validation_have_none():
    with warned() as said:
        learn = faulty_learner('mlp', cbs=[GradAlert()], lr=.01)
        import fastai.callback.schedule
        with learn.no_bar(): learn.lr_find(show_plot=False)
        learn.dls.valid.dataset[0] = (learn.dls.valid.dataset[0][0]*math.nan, learn.dls.valid.dataset[0][1])
        learn.validate()
        learn.get_preds()
    assert not learn.grad_alert.count and not [s for s in said if 'GradAlert' in s]

@pytest.mark.filterwarnings('ignore:GradAlert')
@pytest.mark.parametrize('place', ['rerun','samples','tables'])
def test_ctrl_c_while_it_is_explained(place, monkeypatch):
    learn = faulty_learner('transformer', poison=250, cbs=[GradNormCallback(), GradAlert()], shuffle=False)
    step = 250//BS
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        if place=='rerun': m.setattr(alert.Rerun, 'grads', interrupt)
        else: m.setattr(alert, dict(samples='sample_norms', tables='tensor_table')[place], interrupt)
        with pytest.raises(KeyboardInterrupt): fit(learn)
    assert learn.grad_alert.count==1 and 'interrupted' in str(learn.grad_alert.incidents[0])
    assert len(learn.grad_norm.norms)==step and 'get_idxs' not in learn.dls.train.__dict__
    assert all(m.training for m in learn.model.modules()) and torch.is_grad_enabled()
    learn.opt.zero_grad()
    fit(learn)
    assert len(learn.grad_norm.norms)==step+N//BS

def test_one_sentence_where_nothing_is_finite():
    learn = faulty_learner('mlp', cbs=[GradAlert(action='skip')])
    learn.loss_func = lambda pred, y: (pred.squeeze(-1)-y).pow(2).mean()*math.nan
    with warned() as said: fit(learn, 3)
    assert learn.grad_alert.count==48 and len(learn.grad_alert.incidents)==5
    assert sum('all out of line' in s for s in said)==1 and len(said)<=8

@pytest.mark.filterwarnings('ignore:GradAlert')
def test_weights_that_are_not_finite():
    learn = faulty_learner('mlp', cbs=[GradAlert()])
    with torch.no_grad(): learn.model[0].weight[0,0] = math.nan
    fit(learn)
    assert 'Weights were not finite before this step, 0.weight' in str(learn.grad_alert.incidents[0])

def test_a_new_fit_and_unfreezing():
    learn = faulty_learner('mlp', cbs=[GradAlert()], splitter=lambda m: L([*m[:4].parameters()], [*m[4:].parameters()]).map(list))
    learn.freeze()
    fit(learn, 2)
    learn.unfreeze()
    with torch.no_grad(): learn.model[-1].weight.mul_(100)
    fit(learn, 2)
    assert not learn.grad_alert.count

class Unfreezes(Callback):
    def before_epoch(self):
        if self.epoch==2: self.learn.unfreeze()

def test_unfreezing_in_mid_fit():
    "More parameters, a larger norm: watching starts anew"
    learn = faulty_learner('mlp', cbs=[GradAlert(), Unfreezes()], splitter=lambda m: L([*m[:4].parameters()], [*m[4:].parameters()]).map(list))
    with torch.no_grad(): learn.model[-1].weight.mul_(1000)
    learn.freeze()
    fit(learn, 4)
    assert not learn.grad_alert.count

# --- which item

class DoublesItems(DataLoader):
    def create_batches(self, samps): return super().create_batches(samps)

def items_right(dl):
    "Are the items of an incident those that the batch holds?"
    items = [(x, torch.tensor(float(i))) for i,x in enumerate(torch.randn(N,12, generator=torch.Generator().manual_seed(0)))]
    learn = Learner(DataLoaders(dl(items), DataLoader(items[:8], bs=8)), nn.Linear(12,1), lr=1e-9, opt_func=SGD,
                    loss_func=lambda pred, y, reduction='mean': F.mse_loss(pred.squeeze(-1), y, reduction=reduction)*(math.nan if (y==77).any() else 1),
                    cbs=[GradAlert(action='skip')])
    fit(learn, 2)
    assert len(learn.grad_alert.incidents)
    for o in learn.grad_alert.incidents:
        found = o.kept.batches[0].items
        if found is None: return None
        assert o.batch[1].long().tolist()==found
    assert not {'get_idxs','_noted'} & set(vars(learn.dls.train)) and type(getattr(learn.dls.train, 'batch_sampler', None)).__name__!='NotingSampler'
    return True

def weighted_loader(items):
    from fastai.callback.data import WeightedDL
    wgts = np.where(np.arange(N)==77, 40., 1.)
    return WeightedDL(L(items), bs=16, wgts=wgts, shuffle=True, num_workers=0)

TorchDL = torch.utils.data.DataLoader
loaders_of_items = dict(
    in_order=lambda o: DataLoader(o, bs=16),
    shuffled=lambda o: DataLoader(o, bs=16, shuffle=True),
    last_is_small=lambda o: DataLoader(o, bs=30, shuffle=True, drop_last=False),
    workers=lambda o: DataLoader(o, bs=16, shuffle=True, num_workers=2),
    tfmd=lambda o: TfmdDL(L(o), bs=16, shuffle=True, num_workers=0),
    weighted=weighted_loader,
    pytorch=lambda o: TorchDL(o, 16, shuffle=True),
    pytorch_workers=lambda o: TorchDL(o, 16, shuffle=True, num_workers=2),
    pytorch_sampler=lambda o: TorchDL(o, 16, sampler=torch.utils.data.WeightedRandomSampler([1.]*77+[99.]+[1.]*(N-78), N)))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', loaders_of_items)
def test_items(name):
    set_seed(0)
    assert items_right(loaders_of_items[name])

@pytest.mark.filterwarnings('ignore')
def test_items_are_not_guessed(): assert items_right(lambda o: DoublesItems(o, bs=16)) is None

# --- told elsewhere

@pytest.mark.filterwarnings('ignore:GradAlert')
def test_a_finding_and_a_part_of_the_record(tmp_path):
    learn = fit(faulty_learner('mlp', poison=130, cbs=[GradNormCallback(), GradAlert(action='skip')]))
    found = diagnose(learn)
    row = found[found['rule']=='incident'].iloc[0]
    assert row['severity']=='warning' and 'item 130' in row['evidence'] and not found.ok
    learn.grad_alert.record.incidents[0]['norm'] = math.inf
    from fastai_gradstats.record import GradRecord,as_record
    as_record(learn).save(tmp_path/'r', format='csv')
    assert GradRecord.load(tmp_path/'r').incidents==learn.grad_alert.record.incidents
    page = save_report(learn, tmp_path/'p.html').read_text()
    assert 'Steps out of line' in page and 'item 130 of the training set' in page
    calm = fit(faulty_learner('mlp', cbs=[GradNormCallback(), GradAlert()]))
    assert 'Steps out of line' not in save_report(calm, tmp_path/'p.html').read_text()
    assert not (diagnose(calm)['rule']=='incident').any()
    bare = fit(faulty_learner('mlp', cbs=[GradNormCallback()]))
    assert diagnose(bare).set_index('rule').loc['incident','severity']=='not checked'

def test_an_exported_learner_has_none(tmp_path):
    learn = fit(faulty_learner('mlp', cbs=[GradAlert()]))
    again = pickle.loads(pickle.dumps(learn.grad_alert))
    assert type(again) is Callback
    cb = learn.grad_alert
    learn.remove_cb(cb)
    assert not any('gradstats' in type(c).__module__ for c in learn.cbs)
    assert pickle.loads(pickle.dumps(cb)).count==0
