"Incidents: run again to the bit, written and read."
import json,signal,subprocess,sys
import pytest,torchvision
from fastai.basics import *
from fastai.callback.rnn import ModelResetter,RNNCallback,RNNRegularizer
from fastai.callback.training import GradientAccumulation
from fastai.text.models.awdlstm import AWD_LSTM
from torch import nn
from fastai_gradstats import GradAlert,Incident,probe
from helpers.callbacks import CtrlC
from helpers.faulty import faulty_learner,faulty_nets
from helpers.training import fit,warned

pytestmark = pytest.mark.filterwarnings('ignore:GradAlert', 'ignore:GradStats')

class KeepsGrads(Callback):
    "The gradients of each step, as the optimizer is about to get them"
    order,run_valid = 10.6,False
    def __init__(self): self.seen,self.n = {},-1
    def before_batch(self): self.n += 1
    def before_step(self): self.seen[self.n] = {name:p.grad.clone() for name,p in self.model.named_parameters() if p.grad is not None}

def equal(a, b): return a.keys()==b.keys() and all(torch.equal(torch.nan_to_num(a[k], 7.), torch.nan_to_num(b[k], 7.)) for k in a)

def snapshot(learn):
    "All that a replay must leave alone"
    states = [p.detach().clone() for p in learn.model.parameters()]+[b.clone() for b in learn.model.buffers()]
    grads = [p.grad.clone() for p in learn.model.parameters() if p.grad is not None]
    opt = [v.clone() for s in learn.opt.all_params() for v in s[3].values() if isinstance(v, Tensor)]
    rng = [torch.get_rng_state(), torch.tensor([*random.getstate()[1]]), torch.tensor(np.random.get_state()[1].astype(np.int64))]
    return [*states, *grads, *opt, *rng],[m.training for m in learn.model.modules()],{k:id(v) for k,v in vars(learn).items() if k not in ('lock',)}

def replays(learn, n=2):
    "Each incident of a training is run again, while it trained and afterwards"
    learn.add_cb(seen := KeepsGrads())
    fit(learn, n)
    cb = next(c for c in learn.cbs if isinstance(c, GradAlert))
    assert len(cb.incidents)
    for o in cb.incidents:
        assert o.exact, str(o)
        before = snapshot(learn)
        grads = o.replay(learn)
        after = snapshot(learn)
        assert all(torch.equal(a, b) for a,b in zip(before[0], after[0], strict=True)) and before[1:]==after[1:]
        assert equal({k:v for k,v in seen.seen[o.iteration].items() if k in grads}, grads)
        assert all(not v.any() for k,v in seen.seen[o.iteration].items() if k not in grads)
        learn.model.eval()
        assert equal(o.replay(learn), grads)
    return learn

@pytest.mark.parametrize('action', ['warn','skip'])
@pytest.mark.parametrize('kind', faulty_nets)
def test_replay(kind, action): replays(faulty_learner(kind, poison=130, cbs=[GradAlert(action=action, samples=False)]))

def test_replay_of_an_accumulated_step(): replays(faulty_learner('transformer', poison=130, bs=8, cbs=[GradientAccumulation(32), GradAlert()]), 3)

class Bf16(Callback):
    order = 10
    def before_batch(self):
        self.autocast = torch.autocast('cpu', torch.bfloat16)
        self.autocast.__enter__()
    def after_pred(self): self.learn.pred = to_float(self.pred)
    def after_loss(self): self.autocast.__exit__(None, None, None)

@pytest.mark.parametrize('kind', ['mlp','cnn','transformer'])
def test_replay_under_autocast(kind):
    learn = replays(faulty_learner(kind, poison=130, cbs=[Bf16(), GradAlert()]))
    assert learn.grad_alert.incidents[0].samples['item'][0]==130
    assert not torch.is_autocast_enabled('cpu') and torch.autocast_increment_nesting()==1
    torch.autocast_decrement_nesting()

def model_learner(make, items, loss, cbs=(), bs=8, n_inp=1, **kwargs):
    set_seed(0)
    dls = DataLoaders(DataLoader(L(items), bs=bs, shuffle=True), DataLoader(L(items[:bs]), bs=bs))
    dls.n_inp = n_inp
    return Learner(dls, make(), loss_func=loss, lr=1e-4, cbs=[*cbs], **kwargs)

def mse(pred, y, reduction='mean'): return F.mse_loss(pred.squeeze(-1), y, reduction=reduction)

def far_targets(x, i=100):
    y = torch.randn(len(x))
    y[i] = 1e4
    return list(zip(x, y))

@pytest.mark.slow
def test_replay_of_a_resnet():
    items = far_targets(torch.randn(48,3,32,32), 40)
    replays(model_learner(lambda: torchvision.models.resnet18(num_classes=1), items, mse, [GradAlert(action='skip', samples=False)], bs=4))

def spectral_net(): return nn.Sequential(nn.utils.spectral_norm(nn.Linear(6,16)), nn.Tanh(), nn.utils.parametrizations.spectral_norm(nn.Linear(16,16)), nn.Tanh(), nn.Linear(16,1))

class Remembers(nn.Module):
    "A moving average and a count that its forward pass uses"
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6,1)
        self.register_buffer('mean', torch.zeros(6))
        self.calls = 0
    def forward(self, x):
        self.calls += 1
        with torch.no_grad(): self.mean.lerp_(x.mean(0), .1)
        return self.linear(x-self.mean)*(1+self.calls/1000)

class DrawsAll(nn.Module):
    "Noise from three generators"
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6,1)
    def forward(self, x): return self.linear(F.dropout(x)*np.random.rand()+random.random())

class ChangesInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6,1)
    def forward(self, x): return self.linear(x.mul_(2))

@pytest.mark.parametrize('make', [spectral_net,Remembers,DrawsAll])
def test_replay_of_what_a_model_remembers(make): replays(model_learner(make, far_targets(torch.randn(128,6)), mse, [GradAlert()]))

def test_what_cannot_be_run_again_is_said():
    learn = fit(model_learner(ChangesInput, far_targets(torch.randn(128,6)), mse, [GradAlert()]), 2)
    o = learn.grad_alert.incidents[0]
    assert not o.exact and 'changed its batch in place' in str(o)

class TextModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = AWD_LSTM(50, 16, 16, 2)
        self.head = nn.Linear(16,1)
    def reset(self): self.encoder.reset()
    def forward(self, x):
        out = self.encoder(x)
        return self.head(out[:,-1]),[out],[out]

def test_replay_of_a_text_model():
    "A hidden state from batch to batch, weights that are dropped, a term that a callback adds to the loss"
    items = far_targets(torch.randint(50, (128,7)))
    cbs = [ModelResetter(), RNNCallback(), RNNRegularizer(2., 1.), GradAlert(action='skip')]
    learn = replays(model_learner(TextModel, items, mse, cbs), 2)
    assert learn.grad_alert.incidents[0].samples['place'][0]==int((learn.grad_alert.incidents[0].batch[1]>9000).nonzero())

# --- files

@pytest.fixture(scope='module')
def written(tmp_path_factory):
    d = tmp_path_factory.mktemp('incidents')/'a'
    with warned():
        learn = faulty_learner('transformer', poison=130, cbs=[GradAlert(action='skip', folder=d)])
        fit(learn, 3)
    return learn,d

def test_files(written):
    learn,d = written
    found = Incident.load(d)
    assert len(found)==len(learn.grad_alert.incidents)==len([*d.iterdir()])
    for a,b in zip(found, learn.grad_alert.incidents):
        assert str(a)==str(b) and a.tensors.equals(b.tensors) and a.samples.equals(b.samples) and a.exact is True
        assert equal(a.replay(learn), b.replay(learn))
        assert all(torch.equal(x, y) for x,y in zip(a.batch, b.batch, strict=True))
    assert {p.name for p in d.glob('*/*')}=={'incident.json','tensors.safetensors'}
    json.loads(next(d.glob('*/incident.json')).read_text(), parse_constant=lambda s: pytest.fail(f'{s} is no JSON'))

def test_tables_need_neither_torch_nor_fastai(written):
    _,d = written
    code = f"import sys; from fastai_gradstats import Incident; o = Incident.load({str(d)!r})[0]; print(o); print(o.tensors, o.samples, o._repr_html_()[:9]); assert not {{'torch','fastai'}} & set(sys.modules)"
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert res.returncode==0 and 'item 130' in res.stdout, res.stderr

def test_a_folder_with_incidents_is_refused(written):
    with pytest.raises(ValueError, match='^folder: .* already holds incidents'): GradAlert(folder=written[1])

@pytest.mark.parametrize('name', ['incident.json','tensors.safetensors'])
def test_damaged_files(written, name, tmp_path):
    import shutil
    learn,d = written
    path = tmp_path/'x'
    shutil.copytree(next(d.iterdir()), path)
    content = bytearray((path/name).read_bytes())
    content[len(content)//2] ^= 1
    (path/name).write_bytes(content)
    with pytest.raises(ValueError, match='damaged|not an incident'): Incident.load(path).replay(learn)

@pytest.mark.parametrize('where', ['mkdir','write_bytes','rename'])
def test_a_disk_that_fails(where, tmp_path, monkeypatch):
    "One sentence, nothing left behind, nothing lost in memory"
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    learn = faulty_learner('mlp', poison=130, cbs=[GradAlert(action='skip', folder=tmp_path/'a')])
    with monkeypatch.context() as m, warned() as said:
        m.setattr(os if where=='rename' else Path, where, full)
        fit(learn, 2)
    assert len([s for s in said if 'No space left' in s])==1 and not [*(tmp_path/'a').rglob('*')]
    assert len(learn.grad_alert.incidents)==2 and equal(learn.grad_alert.incidents[0].replay(learn), learn.grad_alert.incidents[0].replay(learn))

def test_the_first_and_the_worst_are_kept():
    from fastai_gradstats.alert import AlertState
    state = AlertState()
    for i,norm in enumerate([5,1,2,9,3,8,4]):
        o = Incident('spike', (0,0,0,i,i), float(norm), 1., 1.)
        state.add(o, 3)
    assert [o.norm for o in state.incidents]==[5,9,8] and state.count==7

def test_show(written):
    set_seed(0)
    from fastai.vision.all import PILImage,DataBlock,ImageBlock,RegressionBlock
    y = dict(enumerate([float(i%7)+1e4*(i==100) for i in range(128)]))
    block = DataBlock((ImageBlock,RegressionBlock), get_x=lambda i: PILImage.create(np.full((8,8,3), i, np.uint8)), get_y=lambda i: y[i], splitter=lambda o: (list(range(128)), [0,1]))
    dls = block.dataloaders(list(range(128)), bs=16, num_workers=0)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192,1)), loss_func=mse, cbs=[GradAlert(action='skip')], lr=1e-5)
    fit(learn, 2)
    o = learn.grad_alert.incidents[0]
    assert o.samples['item'][0]==100
    o.show(learn, n=4)
    fig = plt.gcf()
    assert len([ax for ax in fig.axes if ax.images])==4 and '100' in fig.axes[0].get_title()
    plt.close('all')

def is_left_alone(learn, f):
    "A call of `f` that is interrupted leaves the Learner as it was"
    before = snapshot(learn)
    with pytest.raises(KeyboardInterrupt): f()
    after = snapshot(learn)
    return all(torch.equal(a, b) for a,b in zip(before[0], after[0], strict=True)) and before[1:]==after[1:] and torch.is_grad_enabled()

def test_ctrl_c_as_a_replay_is_put_back(written, monkeypatch):
    "The weights of the step are in the model then: an interrupt waits until they are out again"
    learn,_ = written
    put = probe._Kept.put
    def interrupted(self, again=False):
        if not again: signal.raise_signal(signal.SIGINT)
        put(self, again)
    monkeypatch.setattr(probe._Kept, 'put', interrupted)
    assert is_left_alone(learn, lambda: learn.grad_alert.incidents[0].replay(learn))

@pytest.mark.parametrize('part', [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, 5))])
def test_ctrl_c_anywhere_in_a_replay(written, part):
    learn,_ = written
    def replay(stop):
        with stop: learn.grad_alert.incidents[0].replay(learn)
    rooms = 'incident rerun probe'
    replay(whole := CtrlC(0, rooms))
    for at in range(1+part*whole.n//40, whole.n, whole.n//8):
        assert is_left_alone(learn, lambda: replay(CtrlC(at, rooms))), f'{at} of {whole.n}'

def test_another_model_is_refused(written):
    learn,_ = written
    with pytest.raises(ValueError, match='^learn: its model has no parameter'): learn.grad_alert.incidents[0].replay(faulty_learner('mlp'))

def test_pickle(written):
    learn,_ = written
    o = learn.grad_alert.incidents[0]
    assert equal(pickle.loads(pickle.dumps(o)).replay(learn), o.replay(learn))
