"""Folders of earlier versions load, with the numbers they hold. They are never written again.

`data/format1` was recorded by a fit of two steps, an `lr_find` of two and a second fit of two, with one count of fits for both phases (0, 1 and 2): `csv`
saved as one record, `streamed` to Parquet while it trained. Since then each phase counts its own fits, so that (phase, fit, iteration) is the key."""
from pathlib import Path
import numpy as np,pandas as pd,pytest
from fastai_gradstats import GradRecord,diagnose
from fastai_gradstats.files import category,empty,fixed,read_folder,write_part

OLD = Path(__file__).parent/'data'/'format1'
WHERE = ['phase','fit','iteration','step']
STEPS = [('fit',0,0,0), ('fit',0,1,1), ('lr_find',1,0,0), ('lr_find',1,1,1), ('fit',2,2,2), ('fit',2,3,3)]
NORMS = [.530781, .397529, .519261, .397239, .519261, .398838]

@pytest.fixture(params=['csv','streamed'])
def old(request):
    if request.param=='streamed': pytest.importorskip('pyarrow')
    return GradRecord.load(OLD/request.param)

def places(df): return list(df[WHERE].drop_duplicates().itertuples(index=False, name=None))

def test_steps(old):
    assert places(old.steps)==STEPS
    np.testing.assert_allclose(old.steps['norm'], NORMS, rtol=1e-5)
    np.testing.assert_allclose(old.steps['lr'], [.1,.1,1e-7,2.154435e-6,.1,.1], rtol=1e-5)
    np.testing.assert_allclose(list(old.norms), [n for n,(phase,*_) in zip(NORMS, STEPS) if phase=='fit'], rtol=1e-5)

def test_parameters(old):
    "Of each step the norms of four parameters, whose root of the sum of squares is the step's"
    rows = old.by(phase=None)
    assert places(rows)==STEPS
    together = rows.assign(square=rows['norm'].astype(float)**2).groupby(WHERE, sort=False, observed=True)['square'].sum()**.5
    np.testing.assert_allclose(together, NORMS, rtol=1e-5)

def test_facts(old):
    assert [(o['fit'],o['phase']) for o in old.facts]==[(0,0),(1,1),(2,0)]
    assert {n for o in old.facts for n,*_ in o['params']}=={'0.weight','0.bias','1.weight','1.bias'}

def test_tensors():
    "Two modules and four parameters in six iterations"
    rec = GradRecord.load(OLD/'csv')
    assert places(rec.df)==STEPS and len(rec.df)==36
    assert sorted(rec.names)==['0','0.bias','0.weight','1','1.bias','1.weight']
    largest = rec.df[rec.df['kind']=='output'].groupby(WHERE, sort=False, observed=True)['max_abs'].max()
    np.testing.assert_allclose(largest, [.183097,.125738,.184987,.124050,.184987,.128479], rtol=1e-5)
    frame = rec.log10_max()
    assert frame['iteration'].tolist()==[0,1,2,3]
    np.testing.assert_allclose(frame['log10_max_grad'], np.log10(largest.to_numpy()[[0,1,4,5]]), rtol=1e-5)
    assert rec.select(phase='lr_find').df['fit'].unique().tolist()==[1]
    assert diagnose(rec).ok

@pytest.mark.parametrize('format', ['parquet','csv'])
def test_saved_again(tmp_path, format):
    if format=='parquet': pytest.importorskip('pyarrow')
    rec = GradRecord.load(OLD/'csv')
    rec.save(tmp_path/'again', format=format)
    again = GradRecord.load(tmp_path/'again')
    pd.testing.assert_frame_equal(again.df, rec.df, check_exact=True)
    pd.testing.assert_frame_equal(again.steps, rec.steps, check_exact=True)
    pd.testing.assert_frame_equal(again.by(phase=None), rec.by(phase=None), check_exact=True)
    assert again.facts==rec.facts

@pytest.mark.parametrize('format', ['parquet','csv'])
def test_fits_of_each_phase(tmp_path, format):
    "The first fit and the first `lr_find` are both number 0: parts of several files and ranks keep them apart, in the order in which they were written"
    if format=='parquet': pytest.importorskip('pyarrow')
    def part(phase, fit, iteration):
        cols = {c:category([0], fixed[c]) if c in fixed else np.zeros(1, column.dtype) for c,column in empty('steps').items()}
        cols['phase'] = category([fixed['phase'].index(phase)], fixed['phase'])
        return pd.DataFrame(cols).assign(fit=np.int32([fit]), iteration=np.int32([iteration]))
    written = [('fit',0,0), ('lr_find',0,0), ('lr_find',1,0), ('fit',1,1)]
    for rank in (0,1):
        for number,where in enumerate(written): write_part(tmp_path, 'steps', part(*where), number, rank, format=format)
    if format=='csv': (tmp_path/'gradstats.json').write_text('{"format": 1}')
    df = read_folder(tmp_path)[0]['steps']
    assert list(df[['phase','fit','iteration']].itertuples(index=False, name=None))==written*2
