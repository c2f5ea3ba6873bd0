"""See the gradients of any fastai Learner: one callback, tidy rows, plots and a plain-English summary

Modules:

- `fastai_gradstats.alert`: A step out of line is caught before the optimizer takes it, and explained to the sample
- `fastai_gradstats.buffer`: Rows of sums on one device
- `fastai_gradstats.by_blocks`: Sums on a CPU without numba, and of double precision
- `fastai_gradstats.by_gpu_kernel`: Sums of a gradient on a GPU from one read
- `fastai_gradstats.by_kernel`: Sums of a gradient on a CPU from one read
- `fastai_gradstats.by_rows`: Sums of many tensors on any device, without a look at a number
- `fastai_gradstats.callback`: `GradStatsCallback` and `GradNormCallback`: fastai's events, in the recorder's words
- `fastai_gradstats.capture`: Where gradients are taken: hooks on outputs, reads of parameters
- `fastai_gradstats.consumers`: Records say what they want of a training, and take their share of what was read
- `fastai_gradstats.demo`: Gradients of a real network training on real data, in two minutes on a CPU
- `fastai_gradstats.diagnosis`: Rules over a record, a table of findings
- `fastai_gradstats.differ`: Two records of what should be the same training: the first tensor that differs by more than rounding
- `fastai_gradstats.engine`: The same numbers for many tensors at once, without a sync
- `fastai_gradstats.files`: Records on disk: complete parts, written once
- `fastai_gradstats.forward`: Which module's output was the first that is not finite
- `fastai_gradstats.gpu_launch`: Compiles the GPU's kernels, and launches them at little cost
- `fastai_gradstats.grid`: The numbers of a picture: which rows, in which order, in which cell
- `fastai_gradstats.histogram`: Elements per octave, counted from the bits of a number
- `fastai_gradstats.incident`: A step that was out of line: what it was, whose gradient it was, and the step itself to be run again
- `fastai_gradstats.kernel`: Everything about a gradient in one read, on a CPU
- `fastai_gradstats.kernel_gpu`: Everything about a gradient in one read, on a GPU
- `fastai_gradstats.layouts`: The elements of a tensor, however they are stored
- `fastai_gradstats.live`: Heatmap and norms in a notebook's cell, redrawn while a fit goes on
- `fastai_gradstats.loops`: The same recorder in Hugging Face's Trainer and in Lightning
- `fastai_gradstats.plot`: A record in, Axes out
- `fastai_gradstats.probe`: Gradients away from the training path: along rays through weight space, and sample by sample
- `fastai_gradstats.record`: What was recorded, as `L`, DataFrame and file
- `fastai_gradstats.recorder`: Reads the gradients of a training once, whoever wants them, and knows which of what it read counts
- `fastai_gradstats.report`: A record in, one HTML page out
- `fastai_gradstats.rerun`: A step of training run again, to the bit, and sample by sample
- `fastai_gradstats.resume`: A run goes on with the record of an earlier one
- `fastai_gradstats.stats`: What is measured: one small function per statistic
- `fastai_gradstats.stores`: What training adds to: rows in bulk, in memory that stays bounded
- `fastai_gradstats.stream`: A record goes to files while training goes on
- `fastai_gradstats.trackers`: Norms go to W&B, TensorBoard, MLflow or Trackio while training goes on
- `fastai_gradstats.watch`: An optimizer that tells when it steps and when it clears its gradients"""

__version__ = "0.1.0"

from importlib import import_module

# Public names by module, each loaded when first used: a record is read and drawn without torch or fastai
_home = {n:m for m,ns in dict(
    stats    = 'decade measure statistics',
    engine   = 'Engine',
    capture  = 'OutputHooks clean_name grad_modules grad_params param_grads',
    record   = 'Clip GradRecord NonFinite NotComparable NotRecorded as_record compare',
    recorder = 'GradRecorder',
    callback = 'GradNormCallback GradStatsCallback',
    alert    = 'GradAlert NormWatch',
    incident = 'Incident',
    loops    = 'GradLightningCallback GradTrainerCallback',
    plot     = 'plot_grad_diff plot_grad_flow plot_grad_heatmap plot_grad_hist plot_grad_log10 plot_grad_lr plot_grad_norm plot_ray',
    differ   = 'GradDiff grad_diff',
    diagnosis = 'Findings diagnose',
    report   = 'save_report',
    probe    = 'grad_along_ray per_sample_norms',
    demo     = 'abs_10_power convnet digits digits_learner thread_answer',
).items() for n in ns.split()}
__all__ = list(_home)

def __getattr__(name):
    if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f'.{_home[name]}', __name__), name)
    return globals()[name]

def __dir__(): return [*globals(), *__all__]
