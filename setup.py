"Requirements come from `settings.ini`, everything else from `pyproject.toml`."
from configparser import ConfigParser
from setuptools import setup

cfg = ConfigParser()
with open('settings.ini', encoding='utf-8') as f: cfg.read_file(f)
cfg = cfg['DEFAULT']
suffix = '_requirements'

setup(
    python_requires='>='+cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={k[:-len(suffix)]: v.split() for k,v in cfg.items() if k.endswith(suffix)})
