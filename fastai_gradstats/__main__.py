"`fastai-gradstats demo | report RUN | check RUN`, also `python -m fastai_gradstats`: without a word the demo, which trains on bundled data and looks at the gradients."
import sys
from fastcore.script import anno_parser

def run():
    "Hand the other arguments to the command that the first one names"
    word = sys.argv[1] if len(sys.argv)>1 else ''
    if word in ('demo','report','check'): del sys.argv[1]
    elif word and not word.startswith('-'): sys.exit(f'accepted are demo, report RUN and check RUN, got {word!r}')
    if word=='check': sys.argv.append('--check')
    if word in ('report','check'): from fastai_gradstats.report import main   # without torch
    else: from fastai_gradstats.demo import main
    command = main.__wrapped__   # `call_parse` reads arguments only where a file calls it
    given = vars(anno_parser(command, f'fastai-gradstats {word}'.strip()).parse_args())
    command(**{name:value for name,value in given.items() if name not in ('pdb','xtra')})

if __name__=='__main__': run()
