"Damage, frames from elsewhere and many fits: what is written can be read, and what cannot is named."
import io,json
import numpy as np,pandas as pd,pytest,torch
from torch import nn
from fastai.basics import Learner,SGD
from fastai_gradstats import GradNormCallback,GradRecord,GradStatsCallback,compare
from fastai_gradstats.record import as_record
from helpers.callbacks import TrainOnly
from helpers.training import fit,loaders

pytest.importorskip('pyarrow')

def layers_learner(*cbs, layers=2, n=3):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)], nn.Linear(4, 3))
    return Learner(loaders(torch.randn(8*n, 4), torch.randint(0, 3, (8*n,)), bs=8), model, loss_func=nn.CrossEntropyLoss(),
                   cbs=[*cbs,TrainOnly()], opt_func=SGD)

@pytest.fixture(scope='module')
def trained(): return as_record(fit(layers_learner(GradStatsCallback(hist=True), GradNormCallback())))

def everything(rec): return [o.to_csv() for o in (rec.df, rec.steps, rec.by(), rec.hist_df)]+[rec.threshold, rec.facts]

@pytest.mark.parametrize('name',
                         ('tensors-0-000000.parquet', 'steps-0-000000.parquet', 'params-0-000000.parquet', 'gradstats.json',
                          'tensors-0-000000.csv', 'steps-0-000000.csv'))
def test_flipped_bits(name, trained, tmp_path):
    "A file with one other bit is refused by name; the rest loads where asked for"
    d = trained.save(tmp_path/'a', format='csv' if name.endswith('csv') else 'parquet')
    fn,rng = d/name,np.random.default_rng(0)
    good,want = fn.read_bytes(),everything(GradRecord.load(d))
    for i in rng.integers(len(good), size=60):
        b = bytearray(good)
        b[i] ^= 1<<int(rng.integers(8))
        fn.write_bytes(bytes(b))
        try: got = everything(GradRecord.load(d))
        except ValueError as e: assert name in str(e)
        else: assert got==want
    fn.write_bytes(good)
    assert everything(GradRecord.load(d))==want

@pytest.mark.parametrize('format', ('parquet','csv'))
def test_damaged_mark(format, trained, tmp_path):
    "One byte of the folder's mark that is no UTF-8: its name in the error, and all rows with `errors='skip'`"
    d = trained.save(tmp_path/'a', format=format)
    b = bytearray((d/'gradstats.json').read_bytes())
    b[b.index(b'created')] ^= 0x80
    (d/'gradstats.json').write_bytes(bytes(b))
    with pytest.raises(ValueError, match='gradstats.json: damaged'): GradRecord.load(d)
    with pytest.warns(UserWarning, match='gradstats.json: damaged'): rec = GradRecord.load(d, errors='skip')
    pd.testing.assert_frame_equal(rec.df, trained.df)
    pd.testing.assert_frame_equal(rec.steps, trained.steps)

def from_csv(df): return pd.read_csv(io.StringIO(df.to_csv(index=False)))
def nullable(df): return from_csv(df).convert_dtypes()
def objects(df): return df.astype(object)
def polars_frame(df): return pytest.importorskip('polars').from_pandas(from_csv(df))
def duckdb_frame(df):
    con,rows = pytest.importorskip('duckdb').connect(),from_csv(df)
    return con.from_df(rows).df()

@pytest.mark.parametrize('format', ('parquet','csv'))
@pytest.mark.parametrize('via', (from_csv, nullable, objects, polars_frame, duckdb_frame))
def test_frames_from_elsewhere(via, format, trained, tmp_path):
    "What becomes a record can be saved and loaded, and has the same numbers"
    rec = GradRecord(via(trained.df), via(trained.steps), via(trained.by()), hist=via(trained.hist_df))
    back = GradRecord.load(rec.save(tmp_path/'a', format=format))
    for r in (rec,back):
        for f in (lambda r: r.df, lambda r: r.steps, lambda r: r.by(), lambda r: r.hist_df):
            pd.testing.assert_frame_equal(f(r), f(trained), check_categorical=False, rtol=1e-6)
    assert compare({'a':as_record(via(trained.df)), 'b':trained}).sentence()

@pytest.mark.parametrize('change,say',
                         ((dict(phase='valid'), "'phase' has 'valid'"),
                          (dict(step=.5), "'step' is float64, expected whole numbers"), (dict(name=None), "'name' has .* missing"),
                          (dict(iteration=2**40), "'iteration' goes from"), (dict(norm='a'), "'norm' is"),
                          (dict(when=pd.Timestamp('2026-01-01')), "'when' is datetime"),
                          (dict(skipped=3), "'skipped' is int64, expected True or False")))
def test_named_before_anything_is_written(change, say, trained):
    with pytest.raises(ValueError, match=say): GradRecord(trained.df.assign(**change))
    with pytest.raises(ValueError, match="no column 'max_abs'"): GradRecord(trained.df.drop(columns='max_abs'))

def test_parts_are_one_table(tmp_path):
    "Other tools read all parts together, though later ones know more names"
    import pyarrow.dataset as ds
    stats = GradStatsCallback(folder=tmp_path/'a', hist=True)
    learn = layers_learner(stats, layers=70)
    learn.model[:70].requires_grad_(False)
    fit(learn)
    learn.model.requires_grad_(True)
    fit(learn)
    for table,n in (('tensors',len(stats.df)), ('hist',len(stats.hist_df))):
        files = sorted(map(str, (tmp_path/'a').glob(f'{table}-*.parquet')))
        assert len(files)==2 and len(pd.read_parquet(files))==ds.dataset(files).to_table().num_rows==n

def test_many_fits_cost_the_same(tmp_path):
    "The folder's mark does not grow; facts of every fit come back"
    stats,norms = GradStatsCallback(folder=tmp_path/'a'),GradNormCallback(folder=tmp_path/'a')
    learn,sizes = layers_learner(stats, norms),[]
    for i in range(8):
        fit(learn)
        sizes.append((tmp_path/'a'/'gradstats.json').stat().st_size)
    assert len(set(sizes))==1
    rec = GradRecord.load(tmp_path/'a')
    assert json.dumps(rec.facts)==json.dumps(stats.facts) and [f['fit'] for f in rec.facts]==[*range(8)]
    pd.testing.assert_frame_equal(rec.df, stats.df)
