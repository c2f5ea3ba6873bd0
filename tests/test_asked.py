"What a record answers when it is asked for what it has not got, for one kind or one fit; and that (phase, fit, iteration) is its key everywhere."
import pickle
from collections import namedtuple
import numpy as np,pandas as pd,pytest
from fastai_gradstats import GradRecord,as_record,compare,diagnose
from fastai_gradstats.files import conform
from fastai_gradstats.record import Clip,NonFinite,NotRecorded,delegated,views
from fastai_gradstats.stores import Break,Rows,Steps,Where,breaks_frame,counts,floats,param_rows,step_columns
from fastai_gradstats.stream import Stream

FIT,LR_FIND = 0,1

def tensor_rows(wheres, kinds=('output','param'), keep=None, bad=()):
    "A store with two tensors of each kind; the place in `wheres` is the largest absolute gradient, NaN for those in `bad`"
    rows = Rows(floats, counts, keep)
    keys = [rows.key(i, kind, name) for kind in kinds for i,name in enumerate(('a','b') if kind=='output' else ('a.weight','b.weight'))]
    for i,at in enumerate(wheres):
        values = np.full((5,len(keys)), np.nan if i in bad else i+1, np.float32)
        numbers = np.array([[10],[0],[1 if i in bad else 0],[5]], np.uint32).repeat(len(keys), 1)
        rows.append(at, [len(keys)], keys, values, numbers)
    return rows

def step_rows(wheres):
    steps = Steps()
    for i,at in enumerate(wheres): steps.append(**dict.fromkeys(step_columns, [1.])|{c:[v] for c,v in at._asdict().items()}|dict(norm=[i+1.], skipped=[False]))
    return steps

def norm_rows(wheres):
    params = param_rows()
    keys = [params.key(i, name, 0) for i,name in enumerate(('a.weight','b.weight'))]
    for at in wheres: params.append(at, [2], keys, np.ones((3,2), np.float32), np.empty((0,2), np.uint32))
    return params

def fits(*plan):
    "`Where` of iterations, for (phase, number of iterations) of each fit. A phase counts its own fits; lr_find its own iterations"
    res,n_fits,next_it = [],[0,0],0
    for phase,n in plan:
        start = next_it if phase==FIT else 0
        res += [Where(n_fits[phase], phase, 0, start+i, start+i) for i in range(n)]
        if phase==FIT: next_it += n
        n_fits[phase] += 1
    return res

four = fits((FIT,4))
def stats_only(): return GradRecord(tensor_rows(four))
def norms_only(): return GradRecord(steps=step_rows(four), params=norm_rows(four))
def whole(): return GradRecord(tensor_rows(four), step_rows(four), norm_rows(four))

# --- nothing answers with silence

of_tensors = 'tensors stats names log10_max per_iteration share_above top first_nonfinite'.split()
of_steps = 'steps norms suggest_clip elasticity'.split()
of_params = 'by radial elasticity'.split()
always = 'df breaks facts len select sentence summary save frame lacks kinds_recorded default_kind'.split()

def ask(rec, name, tmp_path):
    "The answer of a view"
    args = dict(save=[tmp_path/'a'], frame=['steps'], lacks=['steps']).get(name, [])
    if name=='len': return len(rec)
    found = getattr(rec, name)
    return found(*args) if callable(found) else found

def test_all_are_asked():
    "The lists above name every public view of a record but plots and findings, and a callback passes them on"
    public = {n for n in [*vars(GradRecord), *views] if not n.startswith('_')}
    writers = {'add_facts','facts_since','still'}
    assert public=={*of_tensors, *of_steps, *of_params, *always, *views, *writers, 'hist_df', 'load'}-{'len'}
    assert set(delegated)==public-writers-{'load'}

@pytest.mark.parametrize('via', ('live','frames','files','selected','pickled'))
def test_what_is_lacking(via, tmp_path):
    "Who asks for what was not recorded hears which callback records it, however the record was made; what is there is answered"
    def through(rec):
        if via=='frames': rec = GradRecord(*(None if rec.lacks(t) else rec.frame(t) for t in ('tensors','steps','params')))
        if via=='files': rec = GradRecord.load(rec.save(tmp_path/f'{len(list(tmp_path.iterdir()))}'))
        if via=='selected': rec = rec.select(phase='fit')
        return pickle.loads(pickle.dumps(rec)) if via=='pickled' else rec
    for make,lacking,callback in ((stats_only, {*of_steps,*of_params}, 'GradNormCallback'), (norms_only, {*of_tensors,'hist_df'}, 'GradStatsCallback')):
        rec = through(make())
        for name in {*of_tensors,*of_steps,*of_params,*always}:
            if name not in lacking:
                ask(rec, name, tmp_path/name/make.__name__)
                continue
            with pytest.raises(NotRecorded, match=callback): ask(rec, name, tmp_path)
    with pytest.raises(NotRecorded, match='hist=True'): through(stats_only()).hist_df

def test_nothing_yet(tmp_path):
    "Before a fit the callback is there: lists and frames are empty"
    for rec in (GradRecord(Rows(floats, counts)), GradRecord(steps=Steps(), params=param_rows()), GradRecord(), GradRecord.load(GradRecord().save(tmp_path/'a'))):
        assert len(rec)==len(rec.df)==0 and rec.sentence()=='Nothing recorded yet.' and repr(rec)
        if not rec.lacks('tensors'): assert [*rec.stats]==[*rec.names]==[] and len(rec.log10_max())==len(rec.top())==len(rec.log10_max(kind='param'))==len(rec.hist_df)==0
        if not rec.lacks('steps'): assert [*rec.norms]==[] and len(rec.steps)==len(rec.by())==len(rec.by('module'))==len(rec.radial())==len(rec.elasticity())==0

def test_merged():
    "Several callbacks know what one of them knows; the last that recorded something counts"
    rec = as_record([stats_only(), norms_only(), GradRecord(Rows(floats, counts))])
    assert not any(map(rec.lacks, ('tensors','steps','params'))) and len(rec.df)==16 and len(rec.steps)==4
    Callback = namedtuple('Callback', 'order')
    class Recorder(Callback): record = property(lambda self: norms_only())
    assert as_record([Callback(1), Recorder(2)]).lacks('tensors') and as_record((Recorder(1),)).df.equals(norms_only().steps)
    with pytest.raises(ValueError, match='none of these'): as_record([Callback(1)])
    for o in ([], [Recorder(1), 3]):
        with pytest.raises(TypeError, match='accepted are'): as_record(o)

def test_compare_keeps_what_is_lacking():
    both = compare(dict(a=norms_only(), b=norms_only()))
    assert both.lacks('tensors') and not both.lacks('steps') and len(both.df)==8
    with pytest.raises(NotRecorded, match='GradStatsCallback'): both.names
    assert len(both.elasticity())==16 and both.by('module')['run'].value_counts().tolist()==[8,8]
    mixed = compare(dict(a=norms_only(), b=stats_only()))
    assert len(mixed.tensors)==16 and len(mixed.steps)==4

def test_columns_are_checked():
    with pytest.raises(ValueError, match="no column 'norm'"): GradRecord(stats_only().df.drop(columns='norm'))
    with pytest.raises(ValueError, match="no column 'kind'"): GradRecord(norms_only().steps)
    with pytest.raises(ValueError, match="no column 'lr'"): GradRecord(steps=stats_only().df)
    with pytest.raises(TypeError, match='tensors: a frame'): GradRecord('runs/a')

def test_own_errors_are_no_missing_attributes():
    class Record(GradRecord):
        @property
        def answer(self): return self.threshold.nothing
    with pytest.raises(RuntimeError, match="Record.answer: 'float' object has no attribute 'nothing'"): Record().answer
    assert not hasattr(GradRecord(), 'answer')

# --- kind means one thing

def test_kind():
    rec = whole()
    assert len(rec.select(kind='both').df)==len(rec.select().df)==len(rec.select(kind=None).df)==16
    assert rec.share_above()==rec.share_above(kind='both')==rec.share_above(kind=None)==.5
    assert set(rec.top(3, kind='param')['kind'])=={'param'} and set(rec.top(16)['kind'])=={'output','param'}
    for kind in ('both','output','param',None): assert len(rec.log10_max(kind=kind))==4

@pytest.mark.parametrize('there,other', (('output','param'), ('param','output')))
def test_kind_that_was_not_recorded(there, other):
    rec = GradRecord(tensor_rows(four, [there]))
    assert len(rec.log10_max())==4
    for f in (rec.select, rec.share_above, rec.top, rec.log10_max, rec.per_iteration):
        with pytest.raises(NotRecorded, match=f"kind='{other}'.*kind='both'"): f(kind=other)
    part = whole().select(kind=there)   # a part knows that the other kind was recorded
    assert len(part.log10_max(kind=other))==0 and np.isnan(part.share_above(kind=other))

# --- fits are numbered as the user counts them

plan = fits((FIT,2), (LR_FIND,3), (FIT,2), (LR_FIND,3))

def test_one_fit():
    "`fit=` beside `phase=`: the fit of that number in its phase"
    rec = GradRecord(tensor_rows(plan), step_rows(plan), norm_rows(plan))
    assert rec.log10_max(fit=1)['iteration'].tolist()==[2,3] and rec.log10_max(fit=[0,1])['iteration'].tolist()==[0,1,2,3]
    assert rec.log10_max(phase='lr_find')['iteration'].tolist()==[0,1,2]*2 and rec.log10_max(phase='lr_find', fit=1)['log10_max_grad'].tolist()==np.log10([8.,9,10]).tolist()
    assert len(rec.log10_max(phase=None))==10 and rec.log10_max(phase=None, fit=0)['iteration'].tolist()==[0,1,0,1,2]
    assert rec.top(1, fit=0)['max_abs'].tolist()==[2] and rec.share_above('fit', phase=None).index.tolist()==[0,1]
    assert rec.suggest_clip(1., fit=0).max_norm==2 and rec.suggest_clip(1., phase='lr_find', fit=0).max_norm==5
    for f in (rec.by, rec.elasticity, rec.radial): assert len(f(fit=1))==4 and len(f(phase='lr_find', fit=1))==6 and len(f(phase=None))==20
    assert 'in 2 of 2 iterations' in rec.sentence(fit=1) and 'in 6 of 6 iterations' in rec.sentence('lr_find') and 'in 10 of 10' in rec.sentence(None)
    assert rec.summary(fit=0).splitlines()[0]==rec.sentence(fit=0) and rec.first_nonfinite(fit=1) is None
    assert rec.df['iteration'].tolist()[::4]==[w.iteration for w in plan]   # in the order of time, phases between each other

def test_clip_of_a_fit_that_was_not_recorded():
    "The message does not send one to a callback that was there"
    rec = GradRecord(steps=step_rows(four))
    for asked in (dict(phase='lr_find'), dict(fit=7)):
        with pytest.raises(ValueError, match='no norms recorded where phase='): rec.suggest_clip(**asked)
    with pytest.raises(ValueError, match='GradNormCallback'): GradRecord().suggest_clip()

def test_same_number_other_phase():
    "Fit 0 of lr_find is not fit 0: neither the skipped step nor the NaN of one is the other's"
    rows = tensor_rows(plan, bad=[3])   # iteration 1 of the first lr_find
    rows.skip(fit=0, phase=LR_FIND, step=1)
    rows.skip(fit=0, phase=FIT, step=3)   # steps go on: its rows are in the second fit
    rec = GradRecord(rows, breaks=())
    assert rec.df[rec.df['skipped']].groupby(['phase','fit','iteration'], observed=True).size().index.tolist()==[('fit',1,3),('lr_find',0,1)]
    assert rec.first_nonfinite() is None and rec.first_nonfinite('lr_find').iteration==1 and rec.first_nonfinite(None).iteration==1
    rows.breaks.append(Break(0, FIT, 1, 'stem', 'a'))       # of another phase than the NaN
    assert rec.first_nonfinite('lr_find').where=='backward'
    rows.breaks.append(Break(0, LR_FIND, 1, 'stem', 'a'))
    assert rec.first_nonfinite('lr_find')==NonFinite(1, 'stem', 'a', 'forward')

def test_breaks_without_a_row():
    "A batch that somebody skipped: the first in time is told, whatever its phase's fits are called"
    rows = tensor_rows(plan, bad=[6])        # iteration 3, in the second fit
    rec = GradRecord(rows)
    rows.breaks.append(Break(0, LR_FIND, 3, 'a', 'b'))      # between the two fits
    assert rec.first_nonfinite().iteration==3 and rec.first_nonfinite().where=='backward'
    assert rec.first_nonfinite(None)==NonFinite(3, 'a', 'b', 'forward')
    rows.breaks.append(Break(1, LR_FIND, 3, 'x', 'y'))      # later than the NaN
    assert rec.first_nonfinite('lr_find', fit=1)==(3, 'x', 'y') and rec.first_nonfinite(None)==(3, 'a', 'b')
    assert rec.select(fit=1).breaks==[(1,1,3,'x','y')] and rec.select(phase='fit').breaks==[]

def test_breaks_of_an_epoch():
    wheres = [Where(0, FIT, i//2, i, i) for i in range(6)]
    rows = tensor_rows(wheres)
    rows.breaks += [Break(0, FIT, i, 'a', f'b{i}') for i in (1,2,5,6)]
    rec = GradRecord(rows)
    assert [[b.iteration for b in rec.select(epoch=e).breaks] for e in (0,1,2,[0,2])]==[[1],[2],[5,6],[1,5,6]]

def test_shuffled_rows_of_two_phases():
    rec = GradRecord(tensor_rows(plan))
    back = GradRecord(rec.df.sample(frac=1, random_state=0))
    for phase in ('fit','lr_find'): pd.testing.assert_frame_equal(back.select(phase=phase).df, rec.select(phase=phase).df)

def test_facts_of_a_part():
    facts = [dict(fit=fit, phase=phase, params=[['a.weight',True,2]], half=False, scaled=False) for phase,fit in ((FIT,0), (LR_FIND,0), (FIT,1))]
    rec = GradRecord(tensor_rows(plan).frame(), facts=facts)
    def which(part): return [(f['phase'], f['fit']) for f in part.facts]
    assert which(rec.select(phase='fit'))==[(0,0),(0,1)] and which(rec.select(fit=0))==[(0,0),(1,0)] and which(rec.select(phase='lr_find', fit=1))==[]

@pytest.mark.parametrize('shared', (False, True))
def test_files(shared, tmp_path):
    "Streamed, loaded and asked; also a folder of the first format, in which both phases counted together"
    wheres = [at._replace(fit=n) for at,n in zip(plan, [0]*2+[1]*3+[2]*2+[3]*3)] if shared else plan
    rows,steps = tensor_rows([], keep=3),step_rows([])
    rec = GradRecord(rows, steps, norm_rows([]))
    streams = [Stream(rec, tmp_path/'a', ['tensors','breaks']), Stream(rec, tmp_path/'a', ['steps','params'])]
    keys = [rows.key(0, 'param', 'a.weight')]
    for at in wheres:
        rows.append(at, [1], keys, np.ones((5,1), np.float32), np.ones((4,1), np.uint32))
        for stream in streams: stream.write(over=lambda where: where.step<at.step)
    for fit,phase,step in {(at.fit, at.phase, at.step) for at in wheres if at.step==1 and at.phase}: rows.skip(fit, phase, step)
    for stream in streams: stream.write()
    back = GradRecord.load(tmp_path/'a')
    second = 2 if shared else 1
    assert back.log10_max(fit=second)['iteration'].tolist()==[2,3] and len(back.log10_max())==4 and len(back.log10_max(phase='lr_find'))==6
    pd.testing.assert_frame_equal(GradRecord.load(back.save(tmp_path/'b')).df, back.df)

# --- answers that unpack

def test_answers_unpack():
    "As tuples they are what they were; equal only where all fields are"
    rec = whole()
    max_norm,share = rec.suggest_clip(.5)
    assert rec.suggest_clip(.5)==(max_norm,share)==(2.5,.5) and rec.suggest_clip(.5)[0]==2.5 and len(rec.suggest_clip())==2
    assert Clip(1., .5)==Clip(1., .5)!=Clip(1., .5, 3) and hash(Clip(1., .5))==hash(Clip(1., .5))
    assert str(Clip(1.3, .5, 2))=='Clip(max_norm=1.3, share=0.5, left_out=2)'
    found = NonFinite(3, 'b', 'a', last=1)
    assert [*found]==[3,'b','a'] and found[1:]==('b','a') and found!=NonFinite(3, 'b', 'a') and found.last==1
    assert pickle.loads(pickle.dumps(found))==found

def test_compare_keeps_facts_and_breaks(tmp_path):
    facts = [dict(fit=0, phase=0, params=[['a.weight',True,2]], half=False, scaled=False)]
    a,b = (GradRecord(tensor_rows(four, bad=bad).frame(), breaks=[(0,'fit',it,'stem','a')], facts=facts) for bad,it in (([2],2), ([],9)))
    both = compare({'one':a, 'two':b})
    for rec in (both, pickle.loads(pickle.dumps(both)), GradRecord.load(both.save(tmp_path/'a'))):
        assert [(f['run'], f['fit']) for f in rec.facts]==[('one',0),('two',0)] and [(o.run, o.iteration) for o in rec.breaks]==[('one',2),('two',9)]
        assert rec.first_nonfinite()==NonFinite(2, 'stem', 'a', 'forward')
        assert rec.select(run='two').first_nonfinite().iteration==9 and [f['run'] for f in rec.select(run='two').facts]==['two']

# --- the store itself

def test_breaks_frame():
    "Breaks with a phase's place or its name; the frame is what files have"
    df = breaks_frame([Break(0, FIT, 7, 'stem', 'body'), Break(0, 'lr_find', 3, '(input)', 'stem')])
    assert conform(df, 'breaks').equals(df) and df['phase'].tolist()==['fit','lr_find']

def test_diagnose_and_page_without_a_table():
    "With either table missing there are findings and a page: rules that cannot look say so"
    for rec in (stats_only(), norms_only()):
        assert 'not checked' in set(diagnose(rec)['severity']) and rec._repr_html_()
