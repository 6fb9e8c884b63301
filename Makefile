# Everything runs from .venv, which is created when missing: nothing but Python, pip and venv is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A file of tests in one process, so that what its tests share is made once.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
KERNELS := hatch_build.py $(wildcard src/factorformer/kernels/compile.py src/factorformer/kernels/csrc/*)
# Folders of tests that neither train, nor export, nor start processes.
UNITS := tests/structures tests/fitting tests/planning tests/layers
# `make results QUICK=1` runs a cheap variant of every benchmark and keeps none of the figures.
QUICK ?=

.PHONY: quickstart test test-fast results render docs

quickstart: $(VENV)/.installed-cli,minilm
	$(BIN)/factorformer quickstart

# One thread for each of the test processes: with more, the threads of one spin while they wait for those of the other.
# No test may need the network, so the Hub is switched off.
test test-fast: export OMP_NUM_THREADS = 1
test test-fast: export HF_HUB_OFFLINE = 1
test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python benchmarks/render.py --check
	$(BIN)/pyright & types=$$!; $(BIN)/python -m pytest $(PYTEST_ARGS); tests=$$?; wait $$types && exit $$tests

# Under two minutes, for the time between two edits; `make test` decides.
test-fast: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS) $(UNITS)

# All figures of the docs from nothing. Data: FACTORFORMER_DATA, or ../shared/data.
results: $(VENV)/.installed-bench,minilm,onnx
	$(BIN)/python benchmarks/everything.py $(if $(QUICK),--quick)
	$(if $(QUICK),,$(MAKE) render)

# The tables and the picture that the docs show of them.
render: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/render.py
	$(BIN)/python benchmarks/readme_figure.py

# The site, in site/; to read it with its search: $(BIN)/python -m http.server --directory site
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The stamps lie in the environment, so that they go when it goes.
$(VENV)/.installed-%: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e ".[$*]"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
