"One page from a record: what is in it, how large it is, and that it works in a browser."
import base64,json,re,shutil,subprocess,sys,time,warnings
from functools import partial
import numpy as np,pandas as pd,pytest,torch
from fastai.optimizer import OptimWrapper,SGD
from matplotlib import pyplot as plt
from fastai_gradstats import GradNormCallback,GradRecord,GradRecorder,GradStatsCallback,compare,diagnose,digits_learner,plot_grad_flow,plot_grad_heatmap,plot_grad_log10,plot_grad_norm,save_report
from fastai_gradstats.report import main
from helpers.project import ROOT,run_command,visit_page

def report_record(tensors=4, n=60, spike=None, bad=None, zero=None):
    "Gradients of 10**-3, but for a spike of 7 at (tensor, iteration), a NaN and a zero"
    it = np.repeat(np.arange(n, dtype=np.int32), tensors)
    name = np.tile(np.arange(tensors, dtype=np.int16), n)
    v = np.full(n*tensors, 1e-3, np.float32)
    for at,x in ((spike,7.),(bad,np.nan),(zero,0.)):
        if at: v[at[1]*tensors+at[0]] = x
    names = [f'layer{i//10}.{i%10}.</script>' for i in range(tensors)]
    cat,o = lambda codes,cs: pd.Categorical.from_codes(codes, cs),np.int32(0)
    df = pd.DataFrame(dict(fit=o, phase=cat(name*0, ['fit','lr_find']), epoch=it//-(-n//2), iteration=it, step=it,
                           kind=cat(name*0, ['output','param']), name=cat(name, names), out=o, call=o, numel=np.int32(10),
                           max_abs=v, mean_abs=v, norm=v, mean=v, std=v, zeros=np.int32(10)*(v==0),
                           nonfinite=np.isnan(v).astype(np.int32), above=(v>1).astype(np.int32), skipped=False))
    s = np.arange(n)
    steps = pd.DataFrame(dict(fit=0, phase=cat(s*0, ['fit','lr_find']), epoch=s*2//n, iteration=s, step=s, lr=.1, loss=1., bs=8,
                              norm=1.+s%3, clip_coef=1/(1.+s%3), clipped_norm=1., weight_norm=1., nonfinite=0, skipped=False))
    return GradRecord(df, steps)

def report_page(rec, tmp_path, **kw): return save_report(rec, tmp_path/'grads.html', **kw).read_text(encoding='utf-8')

def heat_data(s):
    "The page's data, and its values as an array"
    d = json.loads(re.search(r'<script id=data type="application/json">(.*?)</script>', s, re.S)[1])
    return d, np.frombuffer(base64.b64decode(d['v']), '<f4').reshape(d['rows'], d['cols'])

def test_content(tmp_path):
    rec = report_record(spike=(2,40), bad=(1,50), zero=(0,10))
    s = report_page(rec, tmp_path, title='A & B')
    assert '<title>A &amp; B</title>' in s and 'Largest output gradient 7 at iteration 40' in s
    assert 'non_finite' in s and 'after clipping' in s and s.count('<svg')==6   # norm, loss and flow, each for a wide page and a narrow one
    d,v = heat_data(s)
    assert v.shape==(4,60) and v[2,40]==7 and np.isnan(v[1,50]) and v[0,10]==0 and np.sum(v==np.float32(1e-3))==4*60-3
    assert d['names'][2]=='layer0.2.</script> (output)' and d['lo'][40]==d['hi'][40]==40 and '<i class=fit0 style="left:50.00%">' in s

def test_comparison(tmp_path):
    "Each run has its sentence, its findings, its place in the heatmap and its columns in the table"
    s = report_page(compare({'calm <1>':report_record(), 'wild':report_record(n=40, spike=(2,30), bad=(1,20))}), tmp_path)
    assert '<b>calm &lt;1&gt;</b>: Largest output gradient 0.001' in s and '<b>wild</b>: Largest output gradient 7 at iteration 30' in s
    errors = re.findall(r'<tr class="error">(.*?)<tr', s, re.S)
    assert [re.findall(r'<td>([^<]*)', e)[:3] for e in errors]==[['non_finite','error','wild']]
    d,v = heat_data(s)
    assert v.shape==(4,100) and v[2,90]==7 and np.isnan(v[1,80]) and d['segs']==['calm <1>','wild'] and d['seg']==[1]*60+[2]*40 and d['lo'][60]==0
    assert '<i class=fit1 style="left:60.00%">' in s and '<b style="left:60.00%;max-width:40.00%">wild</b>' in s
    heads = re.findall(r'<th class=n>max \|g\|<br><small>([^<]*)', s)
    third = re.findall(r'<tr class=""><td>output<td>layer0\.2[^<]*<td class=n data-v="10">10<td class=n data-v="([^"]*)">[^<]*<td class=n data-v="([^"]*)', s)
    assert heads==['calm &lt;1&gt;','wild'] and third==[('0.00100000005','7')]

def test_alone(tmp_path):
    "Nothing is loaded: no address but the namespaces of SVG, no file"
    s = report_page(report_record(), tmp_path)
    assert not re.search(r'\bsrc=|<link|@import|url\((?!#)', s)
    namespaces = 'http://www.w3.org/','http://purl.org/','https://matplotlib.org','http://creativecommons.org'
    assert all(u.startswith(namespaces) for u in re.findall(r'https?://[^\s"<]+', re.sub(r'<td>.*', '', s)))

def test_large(tmp_path):
    "300 tensors fill all 800 columns; the one spike and the one NaN are there"
    rec = report_record(300, 2400, spike=(123,1001), bad=(7,77))
    s = report_page(rec, tmp_path)
    d,v = heat_data(s)
    assert len(s) < 5e6 and v.shape==(300,800)
    (r,),(c,) = np.where(v==7)
    assert r==123 and d['lo'][c]<=1001<=d['hi'][c]
    (r,),(c,) = np.where(np.isnan(v))
    assert r==7 and d['lo'][c]<=77<=d['hi'][c]

@pytest.mark.parametrize('rec',
                         [GradRecord(), report_record(n=1), GradRecord(report_record().df), GradRecord(steps=report_record().steps),
                          GradRecord(report_record().df.assign(max_abs=np.nan, nonfinite=1)),
                          GradRecord(report_record().df.assign(max_abs=np.float32(0), norm=np.float32(0)))],
                         ids='empty one only_tensors only_steps nan zero'.split())
def test_odd(rec, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert report_page(rec, tmp_path).rstrip().endswith('</html>')
        h = rec._repr_html_()
    assert h.startswith('<p>') and ('data:image/png' in h)==(len(rec.frame('tensors'))>0) and '\n' not in repr(rec) and not plt.get_fignums()

def test_repr_names_findings():
    h = report_record(bad=(1,50))._repr_html_()
    assert '<b>error</b>: non_finite' in h and 'not checked' not in h

def test_command(tmp_path):
    report_record(spike=(2,40)).save(tmp_path/'run', format='csv')
    out = run_command(sys.executable, '-m', 'fastai_gradstats.report', tmp_path/'run', '--html', tmp_path/'a.html', cwd=ROOT)
    assert 'Largest output gradient 7 at iteration 40' in out and (tmp_path/'a.html').stat().st_size>10_000

def test_run_is_identified(tmp_path):
    "Steps, batch, learning rate, loss, parameters and precision stand under the title, and the verdict over the findings"
    learn = digits_learner(cbs=[GradStatsCallback(), GradNormCallback()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
    page = save_report(learn, tmp_path/'page.html').read_text(encoding='utf-8')
    what = r'Sequential, Adam, 22 steps in 1 epochs, batch 64, lr .*, loss .* to .*, \d+ of \d+ parameters trained, float32, fastai [\d.]+, torch \S+, began \d{4}-\d\d-\d\d \d\d:\d\d'
    assert re.search(what, page), page[:3000]
    assert f'<b>{diagnose(learn).verdict}</b>' in page

def test_optimizer_is_named():
    "By the function that made fastai's, by the class of torch's; a plain loop by its own"
    def trained(**kw):
        learn = digits_learner(cbs=GradNormCallback(), **kw)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
        return learn.grad_norm.facts[0]['optimizer']
    assert trained()=='Adam' and trained(opt_func=partial(partial(SGD, mom=.9), wd=.1))=='SGD'
    assert trained(opt_func=partial(OptimWrapper, opt=torch.optim.RAdam))=='RAdam'
    model = torch.nn.Linear(2, 1)
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    with GradRecorder(model, opt) as recorder:
        model(torch.ones(3, 2)).sum().backward()
        opt.step()
    fact = recorder.facts[0]
    assert (fact['model'],fact['optimizer'],fact['versions'])==('Linear','SGD',f'torch {torch.__version__}')

def test_tensors_of_two_networks(tmp_path):
    "A tensor that only one run has stands in the table, without a number for the other"
    rec = report_record()
    other = rec.df.assign(name=rec.df['name'].cat.rename_categories(lambda name: name.replace('.3.', '.other.')))
    s = report_page(compare({'a':rec, 'b':GradRecord(other, rec.steps)}), tmp_path)
    found = re.findall(r'<tr class=""><td>output<td>layer0\.([^.]*)\.[^<]*<td class=n data-v="10">10<td class=n data-v="[^"]*">([^<]*)<td class=n data-v="[^"]*">([^<]*)', s)
    assert sorted(found)==[('0','0.001','0.001'), ('1','0.001','0.001'), ('2','0.001','0.001'), ('3','0.001','nan'), ('other','nan','0.001')]

def run_check(folder, *more):
    "What `fastai-gradstats check` prints last, and its exit status"
    res = subprocess.run([sys.executable, '-m', 'fastai_gradstats', 'check', str(folder), *more], cwd=ROOT, capture_output=True, text=True)
    return (res.stdout.splitlines() or [''])[-1],res.returncode,res.stderr

@pytest.mark.slow
def test_check(tmp_path):
    "The last line is the verdict; 0 where nothing wrong was found, 1 with findings, 2 where nothing could be judged"
    report_record().save(tmp_path/'well', format='csv')
    report_record(bad=(1,50)).save(tmp_path/'sick', format='csv')
    GradRecord().save(tmp_path/'empty', format='csv')
    last,status,_ = run_check(tmp_path/'well')
    assert 'checks, nothing wrong found' in last and status==0
    last,status,_ = run_check(tmp_path/'sick')
    assert 'checks: 1 error' in last and status==1
    last,status,_ = run_check(tmp_path/'empty')
    assert last.startswith('0 of ') and last.endswith('nothing can be said') and status==2
    (tmp_path/'bare').mkdir()
    assert run_check(tmp_path/'bare')[:2]==('0 checks: no record could be read, so nothing can be said', 2)
    last,status,said = run_check(tmp_path/'none')
    assert last.endswith('nothing can be said') and status==2 and 'no such folder' in said and 'Traceback' not in said

def test_pipe_that_closes(tmp_path):
    "As `| head` does"
    report_record().save(tmp_path/'run', format='csv')
    process = subprocess.Popen([sys.executable, '-m', 'fastai_gradstats', 'report', str(tmp_path/'run')], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait()==0 and process.stderr.read()==b''
    process.stderr.close()

def test_unknown_command():
    res = subprocess.run([sys.executable, '-m', 'fastai_gradstats', 'run'], cwd=ROOT, capture_output=True, text=True)
    assert res.returncode==1 and 'accepted are demo, report RUN and check RUN' in res.stderr

def test_help_names_the_commands():
    said = subprocess.run([sys.executable, '-m', 'fastai_gradstats', '--help'], cwd=ROOT, capture_output=True, text=True).stdout
    assert said.startswith('usage: fastai-gradstats [-h]') and 'demo, report RUN and check RUN' in ' '.join(said.split())

def test_command_fails(tmp_path, capsys):
    "A sentence, no traceback; damage can be left out"
    report_record().save(tmp_path/'run', format='csv')
    (tmp_path/'run'/'steps-0-000000.csv').write_text('hello')
    cases = (('none', 'no such folder'), ('', 'no record; expected are files like'), ('run', 'steps-0-000000.csv: no column.*--skip'))
    for folder,say in cases:
        with pytest.raises(SystemExit, match=say): main.__wrapped__(str(tmp_path/folder))
    with pytest.warns(UserWarning, match='1 parts left out'): main.__wrapped__(str(tmp_path/'run'), skip=True)
    assert 'Largest output gradient' in capsys.readouterr().out

@pytest.mark.slow
def test_browser(tmp_path):
    "It opens without a message on the console; a mouse over the spike's pixel reads its tensor, iteration and value; a click sorts"
    assert shutil.which('chromium'), 'Debian: apt-get install chromium'
    s = report_page(report_record(spike=(2,40)), tmp_path)
    s = s.replace('</html>', """<script>{const c=$('heat'),r=c.getBoundingClientRect()
      c.dispatchEvent(new MouseEvent('mousemove',{clientX:r.left+r.width*40.5/60,clientY:r.top+r.height*2.5/4}))
      document.querySelectorAll('.sort th')[3].click()
      document.title=[tip.hidden,tip.textContent,document.querySelector('.sort tbody tr').cells[3].textContent].join('|')}</script></html>""")
    (tmp_path/'hover.html').write_text(s, encoding='utf-8')
    p = visit_page(tmp_path/'hover.html', tmp_path)
    assert p.returncode==0 and 'CONSOLE' not in p.stderr, p.stderr
    title = re.search(r'<title>(.*?)</title>', p.stdout, re.S)[1]
    assert title=='false|layer0.2.&lt;/script&gt; (output)\niteration 40\n7.000|7', title

@pytest.mark.slow
def test_full_size(tmp_path):
    "300 tensors, 100,000 iterations: every plot is there in seconds and has the one spike and the one NaN; the page has at most 5 MB"
    n,k,spike,bad = 100_000,300,(123,60_007),(7,33_333)
    rec = report_record(k, n, spike=spike, bad=bad)
    steps = rec.steps
    steps.loc[spike[1],'norm'] = 7.
    rec = GradRecord(rec.df, steps)
    def drawn(f):
        t = time.process_time()
        ax = f(rec)
        ax.figure.canvas.draw()
        plt.close('all')
        assert time.process_time()-t<40   # on a quiet machine 1 to 5
        return ax
    line = lambda ax,what='line': next(l for l in ax.lines if l.get_gid()==what)
    top = lambda ax: (line(ax).get_xdata()[i := np.nanargmax(line(ax).get_ydata())], line(ax).get_ydata()[i])
    ax = drawn(plot_grad_log10)
    np.testing.assert_allclose(top(ax), (spike[1], np.log10(7)), rtol=1e-6)
    assert line(ax, 'not finite').get_xdata()==[bad[1]]
    assert top(drawn(plot_grad_norm))==(spike[1], 7)
    ax = drawn(plot_grad_heatmap)
    z,over = ax.images[0].get_array(),ax.images[1].get_array()
    at = lambda o: [[o[0]*len(z)//k, o[1]*z.shape[1]//n]]
    assert np.argwhere(z.filled(-9)>0).tolist()==at(spike) and np.argwhere((over[...,0]>.8)&(over[...,1]<.1)).tolist()==at(bad)
    assert line(drawn(partial(plot_grad_flow, iteration=spike[1]))).get_ydata()[spike[0]]==7
    t = time.process_time()
    s = report_page(rec, tmp_path)
    assert time.process_time()-t<200 and len(s)<5e6 and np.nanmax(heat_data(s)[1])==7 and np.isnan(heat_data(s)[1]).sum()==1
