# Every command of this project. `make` alone lists them.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_SLOW := $(VENV)/.installed-slow
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format docs bench soak constraints clean

help:  ## List these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## Make .venv with everything pinned (5.5 GB: torch's ordinary wheel brings CUDA along)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "dinoray needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[dev,s3]'
	@touch $@

$(INSTALLED_SLOW): $(INSTALLED)
	$(PIP_INSTALL) --editable '.[dev,s3,slow]'
	@touch $@

demo: install  ## Extract features of real photographs into ./demo and query them (also without a model hub)
	$(BIN)/python examples/demo.py

test: install  ## The tests that matter at every change (minutes)
	$(BIN)/python -m pytest -m "not slow"

test-all: $(INSTALLED_SLOW)  ## Those and the slow ones (an hour or two; installs Spark, Jupyter's kernel, Ray's metrics)
	$(BIN)/python -m pytest

lint: install  ## Style, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## Put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## Write docs/tables.md, docs/settings.md and dinoray/__init__.pyi out of the code
	$(BIN)/python -m docs.generate
	$(BIN)/ruff format --quiet dinoray/__init__.pyi

bench: install  ## Speed, memory and size as ratios; appends to benchmarks/results.md
	$(BIN)/python -m benchmarks.extract
	$(BIN)/python -m benchmarks.correspondences
	$(BIN)/python -m benchmarks.index
	$(BIN)/python -m benchmarks.correspond
	$(BIN)/python -m benchmarks.kmeans
	$(BIN)/python -m benchmarks.cluster
	$(BIN)/python -m benchmarks.train

soak: install  ## Disturb runs in every way at random moments, then take random walks (SOAK_MINUTES=20 each, SOAK_SEED=any)
	SOAK_MINUTES=$(or $(SOAK_MINUTES),20) $(BIN)/python -m pytest -q tests/pipelines/extract/test_soak.py \
		tests/pipelines/store/test_simulation.py::test_walks_for_a_while

constraints: $(INSTALLED_SLOW)  ## Pin what is installed now
	$(BIN)/pip freeze --exclude-editable --exclude dinoray > constraints.txt

clean:  ## Remove what these commands made
	rm -rf $(VENV) demo benchmarks/work *.egg-info .pytest_cache .mypy_cache .ruff_cache
