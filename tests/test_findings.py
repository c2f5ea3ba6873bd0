"What is picked from findings is findings; fits and runs are told apart; what a probe found out stays with its numbers."
import copy,pickle,warnings
import numpy as np,pandas as pd,pytest
from torch import nn

from fastai_gradstats import GradRecord,compare,diagnose,digits_learner,grad_along_ray,per_sample_norms

def step_frame(n=20, **cols):
    "Calm steps, but for `cols`"
    where = dict(fit=0, phase='fit', epoch=0, iteration=np.arange(n), step=np.arange(n))
    return pd.DataFrame(where|dict(lr=.1, loss=1., bs=64, norm=1., clip_coef=1., clipped_norm=1., weight_norm=10., nonfinite=0, skipped=False)|cols)

def params(n=20, **cols):
    "Calm norms of a parameter, but for `cols`"
    where = dict(fit=0, phase='fit', epoch=0, iteration=np.arange(n), step=np.arange(n))
    return pd.DataFrame(where|dict(name='a.weight', group=0, norm=1., weight_norm=2., dot=.5)|cols)

def tensor_frame(n=20, kind='output', **cols):
    where = dict(fit=0, phase='fit', epoch=0, iteration=np.arange(n), step=np.arange(n))
    return pd.DataFrame(where|dict(kind=kind, name='a', out=0, call=0, numel=10, max_abs=.1, mean_abs=.1, norm=.5, mean=0., std=.1, zeros=0, nonfinite=0, above=0, skipped=False)|cols)

def found(f, rule): return f[(f['rule']==rule)&(f['severity']!='not checked')]

# --- findings

@pytest.fixture
def sick(): return diagnose(GradRecord(steps=step_frame(norm=0., clip_coef=.5)))   # a warning and a note

def test_picked(sick):
    "Rows picked by mask, slice or query, sorted, copied, pickled: with `.ok` of those rows"
    notes = sick[sick['severity']=='note']
    assert not sick.ok and notes.ok and len(notes)==1
    for o in (sick[:1], sick.query("severity=='warning'"), sick.sort_values('rule'), sick.copy(), copy.deepcopy(sick), pickle.loads(pickle.dumps(sick)), sick.head(), sick.drop(columns='try')):
        assert type(o) is type(sick) and not o.ok
    assert type(sick[['tensor','evidence']]) is pd.DataFrame and isinstance(sick['rule'], pd.Series)

def test_printed(sick):
    "As paragraphs of the rows that are left; as a table where a column of the text is gone"
    warnings_ = sick[sick['severity']=='warning']
    assert str(sick).splitlines()[0]==sick.verdict and str(warnings_) in str(sick) and 'zero_norm' in str(warnings_) and 'clipping' not in str(warnings_) and 'not checked' not in str(warnings_)
    assert str(sick[sick['severity']=='error'])=='no findings among these rows'
    assert str(sick[['rule','severity']])==sick[['rule','severity']].to_string()
    assert '<table' in warnings_._repr_html_()

def test_not_known(sick):
    "Findings that have lost how much was looked at are not ok, and without a severity it cannot be said"
    lost = sick[sick['severity']=='note']
    lost.attrs = {}
    assert not lost.ok
    del sick['severity']
    with pytest.raises(ValueError, match="'severity'"): sick.ok

# --- fits

def two_fits(): return pd.concat([step_frame(), step_frame(fit=1, iteration=np.arange(20,40), step=np.arange(20,40), norm=0.)], ignore_index=True)

def test_fit():
    rec = GradRecord(steps=two_fits())
    assert len(found(diagnose(rec, fit=0), 'zero_norm'))==0 and diagnose(rec, fit=0).ok
    for fit in (1, [1], [0,1], None): assert found(diagnose(rec, fit=fit), 'zero_norm')['iterations'].item()=='20 to 39 (20)'
    none = diagnose(rec, fit=5)
    assert not none.ok and 'not recorded in fit 5: GradNormCallback()' in none.set_index('rule').loc['zero_norm','evidence']

def test_phases_apart():
    "Both phases have a fit 0 and a step 15: the loudest parameter is the one of the step that jumped"
    jump = np.where(np.arange(20)==15, 20., 1.)
    both = pd.concat([step_frame(norm=jump, loss=np.where(np.arange(20)>=15, 3., 1.)), step_frame(phase='lr_find', iteration=np.arange(20), step=np.arange(20))], ignore_index=True)
    par = pd.concat([params(norm=jump-.5), params(name='b.weight'), params(phase='lr_find', name='b.weight', norm=99.)], ignore_index=True)
    rec = GradRecord(steps=both, params=par)
    assert found(diagnose(rec, phase=None), 'spike')['tensor'].item()=='a.weight'

def facts(name, phase=0, fit=0): return dict(fit=fit, phase=phase, half=False, scaled=False, params=[('a',True,2), (name,False,2), ('c',True,2)])

def test_facts_of_their_phase():
    "lr_find's fit 0 is not training's fit 0"
    rec = GradRecord(tensor_frame(kind='param'), facts=[facts('found', 1), facts('fitted')])
    assert found(diagnose(rec), 'frozen')['tensor'].tolist()==['fitted']
    rec = GradRecord(tensor_frame(kind='param', phase='lr_find'), facts=[facts('found', 1), facts('fitted')])
    assert found(diagnose(rec, phase='lr_find'), 'frozen')['tensor'].tolist()==['found']

def test_facts_of_their_run():
    rec = compare({'x':GradRecord(tensor_frame(kind='param'), facts=[facts('b')]), 'y':GradRecord(tensor_frame(kind='param'), facts=[facts('d')])})
    assert found(diagnose(rec), 'frozen')[['run','tensor']].to_numpy().tolist()==[['x','b'],['y','d']]

def test_batch_without_a_row():
    "Somebody skipped it since its forward pass broke. A scaler's overflow before it does not hide it, and a fit looked at alone has its own"
    rows = pd.concat([tensor_frame(), tensor_frame(fit=1, iteration=np.arange(21,41), step=np.arange(20,40))], ignore_index=True)
    rows.loc[0, ['nonfinite','skipped']] = [3,True]
    rec = GradRecord(rows, breaks=[(0,0,20,'a','b')])
    assert found(diagnose(rec), 'non_finite')[['severity','tensor','iterations']].to_numpy().tolist()==[['warning','b','20']]
    assert not len(found(diagnose(rec, fit=1), 'non_finite'))

# --- probes

def test_sample_norms():
    "How they were computed and the norm of their mean stay with what is picked, and are shown"
    norms = per_sample_norms(digits_learner(data={}), 6)
    mean,how = norms.attrs['mean_norm'],norms.attrs['how']
    for o in (norms, norms[:2], norms[norms>0], norms.sort_values(), norms.copy(), pickle.loads(pickle.dumps(norms)), norms.rename('x')):
        assert (o.mean_norm,o.how)==(mean,how) and how in repr(o)
    assert 'norm of their mean' in repr(norms) and isinstance(norms.to_frame(), pd.DataFrame) and norms.max()>0

def test_warning_names_the_line():
    "Of the user's call"
    learn = digits_learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data={})
    learn.model.it = (i for i in range(3))
    for f in (lambda: grad_along_ray(learn, [1]), lambda: per_sample_norms(learn, 2)):
        with warnings.catch_warnings(record=True) as got:
            warnings.simplefilter('always')
            f()
        assert [w.filename for w in got if 'neither copied' in str(w.message)]==[__file__]
