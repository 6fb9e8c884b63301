# Everything runs from .venv, which is created when missing: nothing but Python, pip and venv is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_ARGS ?= -n 2
KERNELS := hatch_build.py $(wildcard src/factorformer/kernels/compile.py src/factorformer/kernels/csrc/*)

.PHONY: quickstart test

quickstart: $(VENV)/.installed-minilm
	$(BIN)/factorformer quickstart

# One thread for each of the test processes: with more, the threads of one spin while they wait for those of the other.
# No test may need the network, so the Hub is switched off.
test: export OMP_NUM_THREADS = 1
test: export HF_HUB_OFFLINE = 1
test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The stamps lie in the environment, so that they go when it goes.
$(VENV)/.installed-%: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e ".[$*]"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
