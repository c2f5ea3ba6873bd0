"What a notebook needs: `from fastai_gradstats.all import *`. All other public names come from the package by name"
from fastai_gradstats.stats import decade, measure
from fastai_gradstats.record import GradRecord, as_record, compare
from fastai_gradstats.recorder import GradRecorder
from fastai_gradstats.callback import GradNormCallback, GradStatsCallback
from fastai_gradstats.alert import GradAlert
from fastai_gradstats.incident import Incident
from fastai_gradstats.plot import *
from fastai_gradstats.differ import grad_diff
from fastai_gradstats.diagnosis import diagnose
from fastai_gradstats.report import save_report
from fastai_gradstats.probe import *
from fastai_gradstats.demo import *
