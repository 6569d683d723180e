# Every target that needs an environment makes .venv first and installs into it; a second call finds it ready.
#
#   PYTHON     interpreter that .venv is made from, at least 3.11 (for `gpu`: the one that runs the check)
#   PIP_ARGS   options for pip. On Linux a plain `pip install torch` brings gigabytes of CUDA libraries that nothing
#              here needs: the GPU work is jax's, PyTorch is the reference on the CPU. To have its CPU wheel, download it
#              and pass PIP_ARGS="--find-links DIR", or name the index that holds it: PIP_ARGS="--extra-index-url URL".
#   PYTEST_ARGS   options for pytest, for example PYTEST_ARGS="-k rope -x"
#   PYTEST_JOBS   test processes side by side
#   OUT        where `gpu` and `bench` write their reports
#   H200       where `h200` puts jax's CUDA compiler: beside the environment, whose other tests would look for GPUs

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
PYTEST_JOBS ?= 2
VENV ?= .venv
H200 ?= .h200

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
NEEDS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo parity test lint bench bench-tests gpu h200

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

demo: $(VENV)/.demo ## train a small model, prove it in PyTorch, sample from it: runs/quickstart
	@$(BIN)/python -m experiments.quickstart

parity: $(VENV)/.demo ## compare the quickstart decoder in JAX and PyTorch, all rungs: runs/parity-quickstart
	@$(BIN)/python -m experiments.parity quickstart

test: $(VENV)/.dev ## the test suite
	@$(BIN)/python -m pytest -n $(PYTEST_JOBS) --dist loadfile --no-loadscope-reorder --timeout 300 $(PYTEST_ARGS)

lint: $(VENV)/.dev ## ruff, its formatter and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.demo ## jaxlm beside PyTorch on this CPU, at most twenty minutes: runs/benchmark
	@$(BIN)/python -m experiments.benchmark --suite cpu $(if $(OUT),--out $(OUT))

bench-tests: $(VENV)/.dev ## the measurements among the tests
	@$(BIN)/python -m pytest -m bench -s -p no:xdist $(PYTEST_ARGS)

h200: $(H200)/.compiler ## compile the models for H200s that are not there, and check memory, kernels, collectives
	@PYTHONPATH=$(H200) $(BIN)/python -m pytest -p no:xdist -m "h200 and not slow" tests/jaxlm/test_h200.py tests/jaxlm/test_h200_decode.py tests/jaxlm/test_h200_tuning.py $(PYTEST_ARGS)

gpu: ## the checks that need a CUDA device, with the packages that PYTHON already has
	@$(PYTHON) -m experiments.gpu_check $(if $(OUT),--out $(OUT))

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    f"jaxlm needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.11 ...")'
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(H200)/.compiler: $(NEEDS) | $(VENV)/.dev
	@version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --upgrade \
	    --target $(H200) jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	@touch $@

# What the demo needs is part of what the tests need: an environment for the tests serves the demo too.
$(VENV)/.demo: $(NEEDS) | $(BIN)/python
	@echo "installing jaxlm, PyTorch and matplotlib into $(VENV) (minutes, once)"
	@$(PIP) -e '.[torch,plots]'
	@touch $@

$(VENV)/.dev: $(NEEDS) | $(BIN)/python
	@echo "installing jaxlm and its development tools into $(VENV) (minutes, once)"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo
