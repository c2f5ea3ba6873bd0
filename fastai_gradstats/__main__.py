"`fastai-gradstats demo | report RUN | check RUN`, also `python -m fastai_gradstats`: without a word the demo, which trains on bundled data and looks at the gradients."
import sys
from fastcore.script import anno_parser

commands = 'demo, report RUN and check RUN'

def run():
    "Hand the other arguments to the command that the first one names"
    word = sys.argv[1] if len(sys.argv)>1 else ''
    if word in ('demo','report','check'): del sys.argv[1]
    elif word and not word.startswith('-'): sys.exit(f'accepted are {commands}, got {word!r}')
    else: word = ''
    if word=='check': sys.argv.append('--check')
    try:
        if word in ('report','check'): from fastai_gradstats.report import main   # without torch
        else: from fastai_gradstats.demo import main
    except KeyboardInterrupt: sys.exit(130)   # while modules are loaded, which takes seconds
    command = main.__wrapped__   # `call_parse` reads arguments only where a file calls it
    parser = anno_parser(command, f'fastai-gradstats {word}'.strip())
    if not word: parser.description += f'. That is the command `demo`; commands are {commands}, each with a --help of its own'
    given = vars(parser.parse_args())
    command(**{name:value for name,value in given.items() if name not in ('pdb','xtra')})

if __name__=='__main__': run()
