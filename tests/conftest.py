"The tests' common ground: no display, one project root."
import os
os.environ.setdefault('MPLBACKEND', 'Agg')

from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope='session')
def root(): return ROOT
