# Every target sets itself up on a fresh machine: a virtual environment in .venv, rebuilt when pyproject.toml changes.
#
#   make demo    a real model answers a question about a long text        (DEMO_ARGS="--model ... --budget ...")
#   make test    all tests                                                (PYTEST_ARGS="-k crop -n 0")
#   make bench   finding a passkey with a part of the attention            (writes benchmarks/results/)
#   make lint    ruff and mypy

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help:
	@sed -n 's/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

# torch comes first: without a CUDA GPU one fixed release, so that pip does not choose a newer and larger one by itself.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	if nvidia-smi >/dev/null 2>&1; \
		then $(BIN)/python -m pip install --quiet "torch>=2.11"; \
		else $(BIN)/python -m pip install --quiet torch==2.13.0; fi
	$(BIN)/python -m pip install --quiet -e ".[test,demo,dev]"
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

# One thread and one process per core: on small models more threads only wait for each other.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

bench: $(READY)
	$(BIN)/python benchmarks/passkey.py $(BENCH_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist
