"Everything: `from fastai_gradstats.all import *`"
from fastai_gradstats.stats import *
from fastai_gradstats.engine import *
from fastai_gradstats.capture import *
from fastai_gradstats.files import *
from fastai_gradstats.record import *
from fastai_gradstats.callback import *
from fastai_gradstats.plot import *
from fastai_gradstats.diagnosis import *
from fastai_gradstats.report import *
from fastai_gradstats.probe import *
from fastai_gradstats.demo import *
