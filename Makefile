# make demo | test | test-oldest | test-slow | test-all | test-trackers | test-beside | test-battery | docs | bench | bench-gpu | bench-faults | nbs | readme | dist | clean      [VENV=path] [ARGS="..."]
# The package is installed, editable, into VENV, which is created where there is none.
VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
# One stamp per checkout and extra: nothing is installed twice, nor taken from another checkout that shares VENV
STAMP  := $(VENV)/.gradstats-$(shell pwd | cksum | cut -d' ' -f1)

.PHONY: demo test test-oldest on-this-stack test-slow test-all test-trackers test-beside of-libraries test-battery docs bench bench-gpu bench-faults nbs readme execute dist clean
.SECONDARY:

demo: $(STAMP)-cpu
	$(PY) -m fastai_gradstats $(ARGS)

# All tests side by side, on two cores; those that are named in ARGS one by one, unless it says otherwise
BESIDE := -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP)-dev
	$(PY) -m pytest $(or $(ARGS),$(BESIDE) tests)

# On the oldest stack that settings.ini admits. scikit-learn 1.2 has no wheel for a Python after 3.11
OLDEST ?= .venv-oldest
test-oldest:
	PIP_NO_COMPILE=1 $(MAKE) VENV="$(OLDEST)" CONSTRAINTS=tests/oldest.txt on-this-stack

# Left out: what needs nbdev, which wants today's fastcore (notebooks, generated files); what reads this project's own files (archives,
# pages, the site, the tests' shape); the benchmarks, and Triton's kernels, which nobody uses without asking for them. WITHOUT="names files": these too
NOT_OF_A_STACK := notebooks sync packaging pages site structure benchmarks bench_gpu gpu_kernel gpu_launch traffic
on-this-stack: $(STAMP)-test
	$(PY) -m pytest $(or $(ARGS),$(BESIDE) $(patsubst %,--ignore=tests/test_%.py,$(NOT_OF_A_STACK) $(WITHOUT)) tests)

# With the real trackers, of which MLflow and Trackio bring much with them
test-trackers: $(STAMP)-dev $(STAMP)-trackers
	$(PY) -m pytest -m "slow or not slow" tests/test_trackers.py

# Beside libraries that build on fastai. tsai wants a scikit-learn below today's: an environment of its own
LIBRARIES ?= .venv-beside
test-beside:
	$(MAKE) VENV="$(LIBRARIES)" of-libraries
of-libraries: $(STAMP)-test $(STAMP)-beside
	$(PY) -m pytest -m "slow or not slow" tests/test_beside.py

test-slow: $(STAMP)-dev
	$(PY) -m pytest -m slow $(or $(ARGS),$(BESIDE) tests)

test-all: $(STAMP)-dev
	$(PY) -m pytest -m "not battery" $(or $(ARGS),$(BESIDE) tests)

# Hundreds of trainings: by hand, after a change of what they are about
test-battery: $(STAMP)-dev
	$(PY) -m pytest -m battery $(or $(ARGS),$(BESIDE) tests)

docs: $(STAMP)-docs
	$(PY) docs/build.py

bench: $(STAMP)-bench
	$(PY) -m benchmarks $(ARGS)

# Four minutes on a GPU: checks and measurements, to docs/benchmarks/gpu.md
bench-gpu: $(STAMP)-bench
	$(PY) -m benchmarks.gpu $(ARGS)

# Up to ten minutes: which faults of a training raise an alarm, here and elsewhere, to docs/benchmarks/faults*.csv
bench-faults: $(STAMP)-bench
	$(PY) -W ignore -m benchmarks.faults $(ARGS)

nbs: $(STAMP)-dev
	$(VENV)/bin/nbdev-export
	$(VENV)/bin/nbdev-clean

# make execute ARGS=nbs/index.ipynb: run notebooks and save their outputs
execute: $(STAMP)-dev
	$(PY) docs/execute.py $(ARGS)

readme: $(STAMP)-dev
	$(PY) docs/readme.py

dist: $(STAMP)-dev
	rm -rf dist
	$(PY) -m build
	$(PY) -m twine check --strict dist/*

clean:
	rm -rf _docs _proc dist build *.egg-info .pytest_cache .hypothesis gradstats_demo

$(PY):
	$(PYTHON) -m venv "$(VENV)"

$(STAMP)-%: settings.ini setup.py pyproject.toml $(CONSTRAINTS) | $(PY)
	$(PY) -m pip install -q --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e ".[$*]"
	@find "$(VENV)" -maxdepth 1 -name '.gradstats-*' ! -name '$(notdir $(STAMP))-*' -delete
	@touch "$@"
