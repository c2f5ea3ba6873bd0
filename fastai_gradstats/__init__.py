"""See the gradients of any fastai Learner: one callback, tidy rows, plots and a plain answer

Modules:

- `fastai_gradstats.callback`: `GradStatsCallback` and `GradNormCallback`: when things are read, and nothing else
- `fastai_gradstats.capture`: Where gradients are taken: hooks on outputs, reads of parameters
- `fastai_gradstats.engine`: The same numbers for many tensors at once, without a sync
- `fastai_gradstats.record`: What was recorded, as `L`, DataFrame and file
- `fastai_gradstats.stats`: What is measured: one small function per statistic"""

__version__ = "0.1.0"
