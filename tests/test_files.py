"Records on disk: what was written comes back, whatever went wrong on the way."
import os,subprocess,sys,warnings
import numpy as np,pandas as pd,pytest
from fastai.basics import Learner,SGD,accuracy,partial
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from conftest import ROOT,run
from oracles import fit,loaders
from types import SimpleNamespace
import torch
from torch import nn
from fastai_gradstats import GradNormCallback,GradRecord,GradStatsCallback,diagnose
from fastai_gradstats.record import as_record

pytest.importorskip('pyarrow')

def learner(cbs, n=60, **kwargs):
    torch.manual_seed(0)
    x,y = torch.randn(n, 4),torch.randint(0, 3, (n,))
    return Learner(loaders(x, y, bs=10), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), loss_func=nn.CrossEntropyLoss(), cbs=cbs, **kwargs)

def both(folder, **kwargs): return GradStatsCallback(folder=folder),GradNormCallback(folder=folder, **kwargs)

def same(rec, gcb, gnc):
    pd.testing.assert_frame_equal(rec.df, gcb.df)
    pd.testing.assert_frame_equal(rec.steps, gnc.df)
    pd.testing.assert_frame_equal(rec.by(), gnc.by(), check_dtype=False)

def test_stream(tmp_path):
    "Two fits with accumulation over an odd number of batches"
    gcb,gnc = both(tmp_path/'a', update_every=1)
    learn = learner([gcb, gnc, GradientAccumulation(40)])
    fit(learn, 2); fit(learn)
    same(GradRecord.load(tmp_path/'a'), gcb, gnc)
    assert not list((tmp_path/'a').glob('.*'))

def test_taken(tmp_path):
    fit(learner(both(tmp_path/'a')))
    with pytest.raises(ValueError, match='already holds a record'): GradStatsCallback(folder=tmp_path/'a')
    code = f"from fastai_gradstats import GradNormCallback; GradNormCallback(folder={str(tmp_path/'a')!r})"
    res = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert res.returncode and 'already holds a record' in res.stderr

def test_disk_full(tmp_path, monkeypatch):
    gcb = GradStatsCallback(folder=tmp_path/'a')
    learn,real = learner(gcb),os.replace
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'replace', full)
    with pytest.warns(UserWarning, match='No space left') as w: fit(learn, 2)
    assert len([o for o in w if 'No space' in str(o.message)])==1 and len(gcb.stats)==12 and not list((tmp_path/'a').glob('*.parquet'))
    monkeypatch.setattr(os, 'replace', real)
    fit(learn)
    pd.testing.assert_frame_equal(GradRecord.load(tmp_path/'a').df, gcb.df)

def test_reads_without_torch(tmp_path):
    fit(learner(both(tmp_path/'a')))
    code = f"import sys; from fastai_gradstats import GradRecord, plot_grad_log10; r = GradRecord.load({str(tmp_path/'a')!r}); assert len(r)==6; plot_grad_log10({str(tmp_path/'a')!r}); assert not {{'torch','fastai'}} & sys.modules.keys()"
    res = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert not res.returncode, res.stderr

def test_update_norm():
    "Plain SGD moves a parameter by lr times its gradient"
    gnc = GradNormCallback(update_every=2)
    fit(learner(gnc, opt_func=partial(SGD, mom=0.), wd=0.), lr=.1)
    df = gnc.df
    np.testing.assert_allclose(df['update_norm'][::2], .1*df['norm'][::2], rtol=1e-4)
    assert df['update_norm'][1::2].isna().all()
    p = gnc.by()
    np.testing.assert_allclose(p['update_norm'][p['step']%2==0], .1*p['norm'][p['step']%2==0], rtol=1e-3)

def test_show(tmp_path):
    gnc = GradNormCallback(show=True)
    learn = learner(gnc, path=tmp_path, metrics=accuracy)
    plain = learner(None, metrics=accuracy)
    fit(learn, 2, cbs=[CSVLogger(), SaveModelCallback(monitor='grad_norm', comp=np.less)]); fit(plain, 2)
    log = CSVLogger.read_log(SimpleNamespace(path=tmp_path, fname='history.csv'))
    assert list(log)==['epoch','train_loss','valid_loss','accuracy','grad_norm','time']
    np.testing.assert_allclose(log['grad_norm'], gnc.df.groupby('epoch')['norm'].mean(), rtol=1e-6)
    assert len(learn.validate())==len(plain.validate())==2
    learn.remove_cb(gnc)
    fit(learn)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','accuracy','time'] and len(learn.cbs)==len(plain.cbs)

class Halves(nn.Module):
    "One layer is never used, the last but one is frozen, a rectifier is dead"
    def __init__(self):
        super().__init__()
        self.a,self.dead,self.frozen,self.head,self.idle = nn.Linear(4, 8),nn.Linear(8, 8),nn.Linear(8, 8),nn.Linear(8, 3),nn.Linear(8, 3)
        nn.init.constant_(self.dead.bias, -100.)
        self.frozen.requires_grad_(False)
    def forward(self, x): return self.head(self.frozen(self.dead(self.a(x)).relu()))

@pytest.mark.parametrize('include', [None, '^(a|dead|frozen)'])
def test_diagnosis_of_files(tmp_path, include):
    "Findings from a folder, streamed or saved, read where neither torch nor fastai is loaded, are those of the live record"
    learn = learner([GradStatsCallback(folder=tmp_path/'a', include=include), GradNormCallback(folder=tmp_path/'a', update_every=2)])
    learn.model = Halves()
    learn.create_opt()
    fit(learn); fit(learn)
    want,rec = diagnose(learn),as_record(learn)
    assert {'frozen','dead_units','unused'}-({'unused'} if include else set()) <= set(want['rule']) and not {'unused','frozen','fp16_flush'} & set(want.query('severity=="not checked"')['rule'])
    if include: assert 'unused' not in set(want['rule']) and [n for n,*_ in rec.facts[0]['params']]==['a.weight','a.bias','dead.weight','dead.bias','frozen.weight','frozen.bias']
    rec.save(tmp_path/'parquet'); rec.save(tmp_path/'csv', format='csv')
    code = "import sys; from fastai_gradstats import diagnose; [diagnose(d).to_json(d+'.json') for d in sys.argv[1:]]; assert not {'torch','fastai'} & sys.modules.keys()"
    folders = [str(tmp_path/n) for n in ('a','parquet','csv')]
    run(sys.executable, '-c', code, *folders, cwd=ROOT)
    for d in folders: assert open(d+'.json').read()==want.to_json()
