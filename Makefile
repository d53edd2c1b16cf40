# Every target sets itself up on a fresh machine: a virtual environment in .venv, rebuilt when pyproject.toml changes.
#
#   make demo    a real model answers a question about a long text        (DEMO_ARGS="--model ... --budget ...")
#   make test    every behaviour, in 11 to 18 minutes on two cores       (PYTEST_ARGS="-k crop -n 0")
#   make slow    the long sweeps, which make test leaves out              (PYTEST_ARGS as well)
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
.PHONY: help demo test slow lint bench clean

help:
	@sed -n 's/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

# torch comes first: without a CUDA GPU one fixed release, so that pip does not choose a newer and larger one by itself.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	if nvidia-smi >/dev/null 2>&1; \
		then $(BIN)/python -m pip install "torch>=2.11"; \
		else $(BIN)/python -m pip install torch==2.13.0; fi
	$(BIN)/python -m pip install -e ".[test,demo,dev]"
	touch $@

# Passive: threads that wait for each other sleep. Else they spin, and other programs on the same cores slow them down by ten.
demo: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python examples/demo.py $(DEMO_ARGS)

# One thread and one process per core: on small models more threads only wait for each other. Each process starts with a run of
# neighbours, which share models and what is expected of them, and takes over from the others at the end. Compiled files are kept,
# else each process compiles all tests anew.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist worksteal

test: $(READY)
	$(PYTEST) $(PYTEST_ARGS)

slow: $(READY)
	$(PYTEST) -m slow $(PYTEST_ARGS)

bench: $(READY)
	$(BIN)/python -m benchmarks.quality.passkey $(BENCH_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist
