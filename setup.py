"Requirements come from `settings.ini`, PyPI's page from README.md, everything else from `pyproject.toml`."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

cfg = ConfigParser()
cfg.read_string(Path('settings.ini').read_text(encoding='utf-8'))
cfg = cfg['DEFAULT']
suffix = '_requirements'
raw = 'https://raw.githubusercontent.com/fastai-gradstats/fastai-gradstats/main/'  # PyPI shows no relative picture

setup(
    long_description=re.sub(r'\]\((?=docs/images/)', f']({raw}', Path('README.md').read_text(encoding='utf-8')),
    long_description_content_type='text/markdown',
    python_requires='>='+cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={k[:-len(suffix)]: v.split() for k,v in cfg.items() if k.endswith(suffix)})
