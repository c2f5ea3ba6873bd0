"Which tensors have rows: frozen and unfrozen, unused, made or replaced on the way."
import numpy as np,pytest,torch
from fastai.basics import *
from torch import nn
from fastai_gradstats import GradNormCallback,GradStatsCallback
from helpers.callbacks import total_norm
from helpers.learners import check_watched,fastai_learners,group_names,names_by_kind,vision_toy,watched_learner
from helpers.models import Branches
from helpers.oracles import GradSpy,Twin,owner_names
from helpers.training import both_callbacks,fit,image_learner,loaders,step_learner

# --- frozen and unfrozen

def test_freezing():
    "Rows appear when a tensor starts to take part and stop when it ceases to; fits are told apart."
    learn,twin,spy = watched_learner(vision_toy, train_bn=False)
    a,b,c = group_names(learn)
    owner = lambda names: {n.rpartition('.')[0] for n in names}
    stages = (learn.freeze, c),(partial(learn.freeze_to, -2), b|c),(learn.unfreeze, a|b|c),(learn.freeze, c),(learn.unfreeze, a|b|c)
    for i,(stage,want) in enumerate(stages):
        stage()
        fit(learn, lr=slice(1e-5,1e-3))
        assert names_by_kind(learn, i)==[owner(want), want]
    check_watched(learn, twin, spy)
    assert learn.grad_stats.df['fit'].unique().tolist()==[0,1,2,3,4]
    assert learn.grad_stats.df['iteration'].unique().tolist()==list(range(10))
    assert learn.grad_norm.df['fit'].tolist()==[0,0,1,1,2,2,3,3,4,4]

def test_frozen_but_batchnorm():
    """fastai trains BatchNorm in a frozen body: its weights have rows, the convolutions' have not, while gradients pass through all
    outputs from the first BatchNorm on."""
    learn,twin,spy = watched_learner(vision_toy)
    learn.freeze()
    fit(learn)
    out,par = names_by_kind(learn, 0)
    convs = {n for n,m in learn.model.named_modules() if isinstance(m, nn.Conv2d)}
    assert not par & {f'{n}.weight' for n in convs} and '0.1.weight' in par
    assert out==set(owner_names(learn.model))-{'0.0'}
    check_watched(learn, twin, spy)

def test_fine_tune():
    learn,twin,spy = watched_learner(vision_toy, train_bn=False)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, freeze_epochs=1)
    assert names_by_kind(learn, 0)[1]==group_names(learn)[-1] and len(names_by_kind(learn, 1)[1])==len(list(learn.model.parameters()))
    check_watched(learn, twin, spy)
    d = learn.grad_stats.df
    assert d.groupby('iteration')[['fit','epoch']].first().values.tolist()==[[0,0]]*2+[[1,0]]*2+[[1,1]]*2

class FreezesInMidFit(Callback):
    "In mid-fit"
    def __init__(self, epoch, to): self.at,self.to = epoch,to
    def before_epoch(self):
        if self.epoch==self.at: self.learn.freeze_to(self.to)

@pytest.mark.parametrize('to', (0,-1))
def test_frozen_in_mid_fit(to):
    "From one epoch to the next."
    learn,twin,spy = watched_learner(vision_toy, train_bn=False)
    learn.freeze_to(-1-to)
    fit(learn, 3, cbs=FreezesInMidFit(1, to))
    check_watched(learn, twin, spy)
    d = learn.grad_stats.df
    n = d[d['kind']=='param'].groupby('epoch')['name'].nunique()
    allp,head = len(list(learn.model.parameters())),len(group_names(learn)[-1])
    assert n.tolist()==([head,allp,allp] if to==0 else [allp,head,head])

class ThawsEachBatch(Callback):
    "One more layer per batch"
    def before_batch(self):
        if self.training:
            for i,m in enumerate(self.model[1:]): m.requires_grad_(i>=2-self.iter)

def test_frozen_in_mid_epoch():
    "A module that becomes trainable between two batches."
    set_seed(0)
    g = torch.Generator().manual_seed(0)
    dls = loaders(torch.randn(12,4, generator=g), torch.randint(3, (12,), generator=g), 4)
    twin,spy = Twin(),GradSpy()
    learn = fit(Learner(dls, nn.Sequential(nn.Flatten(), *(nn.Linear(4 if i<2 else 4,4 if i<2 else 3) for i in range(3))),
                        loss_func=CrossEntropyLossFlat(), opt_func=SGD,
                        cbs=[ThawsEachBatch(), GradStatsCallback(), GradNormCallback(), twin, spy]))
    check_watched(learn, twin, spy)
    d = learn.grad_stats.df
    assert d[d['kind']=='output'].groupby('iteration')['name'].apply(list).tolist()==[['3'],['2','3'],['1','2','3']]

@pytest.mark.parametrize('name', ('language_model','classifier'))
def test_text_freezing(name):
    "ULMFiT's gradual unfreezing, with an embedding that is tied to the decoder in the language model."
    learn,twin,spy = watched_learner(fastai_learners[name])
    gs = group_names(learn)
    for i in range(1,len(gs)+1):
        learn.freeze_to(-i)
        fit(learn, lr=slice(1e-4,1e-3))
        assert names_by_kind(learn, i-1)[1]==set().union(*gs[-i:])
    check_watched(learn, twin, spy)

# --- unused

def test_unused_parameters():
    "`grad is None`: no row. Zeros that fastai's `zero_grad` left: a row of zeros."
    learn = fit(image_learner(Branches, both_callbacks()))
    d = learn.grad_stats.df
    assert not d['name'].astype(str).str.startswith('never').any()
    b = d[d['name']=='b.weight'].set_index('iteration')
    assert b.index.tolist()==[1,2,3] and b['zeros'].tolist()==[0,1920,0] and b['max_abs'][2]==0
    assert d[(d['name']=='b')].iteration.tolist()==[1,3]

def test_unused_parameters_of_torch_optimizers():
    "torch's optimizers set gradients to None: a parameter that is not used this step has no row."
    learn = fit(image_learner(Branches, both_callbacks(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD)))
    d = learn.grad_stats.df
    for n,its in (('a.weight',[0,2]), ('b.weight',[1,3])): assert d.loc[d['name']==n,'iteration'].tolist()==its

# --- a network that changes

@pytest.mark.parametrize('kind', (nn.LazyLinear, None))
def test_lazy_layers(kind):
    "The first batch makes them: recorded from it on, with the dimensions they have then"
    model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))
    learn = step_learner(both_callbacks(norm=dict(update_every=1)), model=model) if kind else step_learner([GradNormCallback()], model=model)
    truth = None
    fit(learn)
    assert learn.grad_norm.df['norm'].notna().all() and learn.grad_norm.record.facts[0]['params']==[['0.weight',True,2],['0.bias',True,1],['2.weight',True,2],['2.bias',True,1]] or \
           [tuple(p) for p in learn.grad_norm.record.facts[0]['params']]==[('0.weight',True,2),('0.bias',True,1),('2.weight',True,2),('2.bias',True,1)]

class Grows(Callback):
    def change(self): self.learn.model.append(nn.Linear(3,3))
class Replaces(Callback):
    def change(self): self.learn.model[0].weight = nn.Parameter(self.learn.model[0].weight.detach()*2)
class Another(Callback):
    def change(self): self.learn.model = nn.Sequential(nn.Linear(6,3))
for c in (Grows,Replaces,Another):
    def after_batch(self):
        if not self.learn.training or self.learn.iter!=1: return
        self.change()
        self.learn.create_opt()
    c.after_batch = after_batch

@pytest.mark.parametrize('cb', (Grows,Replaces,Another))
def test_network_that_changes_in_mid_epoch(cb):
    class Total(Callback):
        order,norms = 999,()
        def before_step(self): self.norms = [*self.norms, total_norm(p.grad for p in self.learn.model.parameters())]
    learn = step_learner([*both_callbacks(), cb(), norms := Total()])
    fit(learn)
    np.testing.assert_allclose(learn.grad_norm.df['norm'], norms.norms, rtol=1e-5)
    d = learn.grad_stats.df
    assert (d['fit']==0).all() and d[d['kind']=='output'].groupby('iteration').size().tolist()==[2,2]+[{Grows:3,Replaces:2,Another:1}[cb]]*2
