"What does not train leaves no row and no hook; a Learner that leaves the house takes nothing of ours along."
import io,subprocess,sys
from contextlib import redirect_stdout
import torch
from fastai.basics import *
from helpers.learners import tabular_toy
from helpers.training import both_callbacks,fit,image_learner,linear_classifier,step_learner

def test_not_training(tmp_path):
    "No row and no hook from anything that does not train, and nothing lost after it."
    learn = image_learner(cbs=both_callbacks())
    learn.path = tmp_path
    learn.validate(); learn.get_preds()
    assert len(learn.grad_stats.df)==0 and list(learn.grad_stats.df.columns)[0]=='fit'
    fit(learn)
    n = len(learn.grad_stats.df),len(learn.grad_norm.df)
    learn.validate(); learn.get_preds(); learn.get_preds(dl=learn.dls.train)
    learn.summary()
    from fastai.interpret import Interpretation
    Interpretation.from_learner(learn)
    assert (len(learn.grad_stats.df),len(learn.grad_norm.df))==n
    assert not any(m._forward_hooks for m in learn.model.modules()) and '_do_epoch_train' not in learn.__dict__
    torch.save(learn, io.BytesIO())

def test_one_batch_without_fit():
    "As fastai's own notebooks do."
    learn = image_learner(linear_classifier)
    learn.remove_cbs(learn.cbs[:])
    learn.add_cbs(both_callbacks())
    learn.create_opt()
    learn.training = True
    learn.one_batch(0, learn.dls.one_batch())
    assert len(learn.grad_stats.df)==len(learn.grad_norm.df)==0

def test_one_batch_without_a_fit():
    learn = step_learner(both_callbacks(), default_cbs=False)
    learn.create_opt()
    learn.training = True
    learn.one_batch(0, first(learn.dls.train))
    assert len(learn.grad_stats.df)==len(learn.grad_norm.df)==0

def test_show_results():
    "A learner that can decode: `predict`, `show_results`, `summary` leave the record alone."
    learn = fit(tabular_toy(cbs=both_callbacks()))
    n = len(learn.grad_stats.df),len(learn.grad_norm.df)
    with learn.no_bar(), redirect_stdout(io.StringIO()):
        learn.show_results(max_n=2)
        learn.predict(learn.dls.train_ds.items.iloc[0])
        learn.summary()
    assert (len(learn.grad_stats.df),len(learn.grad_norm.df))==n
    assert not any(m._forward_hooks for m in learn.model.modules())

# --- leaving the house

def test_export(tmp_path, monkeypatch):
    "An exported learner loads, predicts and trains where this package cannot be imported."
    from fastai.test_utils import synth_learner
    learn = fit(synth_learner(cbs=both_callbacks()))
    learn.path = tmp_path
    monkeypatch.setattr(torch.utils.data.TensorDataset, 'new_empty', lambda self: torch.utils.data.TensorDataset(torch.empty(0)), raising=False)
    learn.validate()
    learn.export('m.pkl')
    assert len(learn.grad_stats.df)
    code = """if True:
        import sys
        sys.modules['fastai_gradstats'] = None
        from fastai.learner import load_learner
        import torch
        learn = load_learner(sys.argv[1])
        x = torch.ones(4,1)
        learn.model(x).sum().backward()
        assert not any(m._forward_hooks for m in learn.model.modules())
    """
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(tmp_path/'m.pkl')], check=True)

class ExportsInMidFit(Callback):
    "Exports the learner in mid-fit"
    def after_batch(self):
        if self.training and self.iter==1:
            b = io.BytesIO(); torch.save(self.learn, b)
            assert b'gradstats' not in b.getvalue()

def test_export_in_mid_fit():
    learn = fit(image_learner(cbs=[*both_callbacks(), ExportsInMidFit()]))
    assert len(learn.grad_norm.norms)==4
