"`python -m fastai_gradstats`: train on bundled data and look at the gradients."
from fastai_gradstats.demo import main
main()
