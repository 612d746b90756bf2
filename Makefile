# Every chore of this project. Each sets itself up: the first one makes .venv and installs into it, the others start at once.
#
#   PYTHON=python3.12     the Python to make .venv with, 3.11 or newer
#   ARGS="--epochs 1"     handed on to the program that the chore runs
#   ROUNDS=100            how many rounds `make long` goes, 25 by default
#   TORCH_INDEX=ADDRESS   a package index with CPU builds of torch. By default pip on Linux takes torch with CUDA, some
#                         gigabytes; PyTorch's own "get started" page names its index for CPU.
#
# A mirror of the package index is set where pip always reads it: in pip's configuration, or as PIP_INDEX_URL.

PYTHON ?= python3
ARGS ?=
ROUNDS ?= 25
TORCH_INDEX ?=
BIN := .venv/bin
READY := .venv/.ready
# What most changes break first, and what runs in seconds; the heart by its own tests.
QUICK := hpclab $(patsubst %,tests/test_%.py,layers packaging docs laws rows whole machine figures ledger checkpoint training rank launcher)

.PHONY: help run lab test test-quick long lint notebooks docs bench clean

help: ## list the chores (this)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

run: $(READY) ## a real training run on this machine, measured on 1 and 2 ranks
	@$(BIN)/hpclab demo $(ARGS)

lab: $(READY) ## JupyterLab, opened on your own copy of the course
	@$(BIN)/hpclab lab $(ARGS)

test: $(READY) ## all tests, two at a time
	@$(BIN)/python -m pytest -n auto $(ARGS)

test-quick: $(READY) ## what is most worth knowing while one works, in some minutes
	@$(BIN)/python -m pytest -n auto $(QUICK) $(ARGS)

long: $(READY) ## what takes longer than CI has; benchmarks/long.jsonl keeps its figures
	@HPCLAB_KILLS=$(ROUNDS) $(BIN)/python -m pytest -n auto -m "long or rounds" -o faulthandler_timeout=3600 --record benchmarks/long.jsonl $(ARGS)

lint: $(READY) ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python -m mypy

notebooks: $(READY) ## the course's notebooks, from notebooks/source
	@$(BIN)/python notebooks/build.py $(ARGS)

docs: $(READY) ## the documentation as web pages, in docs/_build; a warning is an error
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going $(ARGS) docs docs/_build
	@echo "Open docs/_build/index.html"

bench: $(READY) .venv-peers/.ready ## throughput and launches, as ratios measured side by side, also with other launchers
	@$(BIN)/python benchmarks/throughput.py $(ARGS)
	@$(BIN)/python benchmarks/launch.py $(ARGS)
	@$(BIN)/python benchmarks/cold.py
	@$(BIN)/python benchmarks/network.py
	@$(BIN)/python benchmarks/cells.py
	@$(BIN)/python benchmarks/playground.py
	@$(BIN)/python benchmarks/balance.py
	@$(BIN)/python benchmarks/strategies.py
	@$(BIN)/python benchmarks/recovery.py
	@.venv-peers/bin/python benchmarks/frameworks.py

clean: ## remove .venv, builds and caches; results stay
	rm -rf .venv .venv-peers dist docs/_build docs/generated .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is removed before an install and written after it: without one, an install was interrupted, and we start afresh.
$(READY): pyproject.toml constraints.txt $(BIN)/python
	@[ -e $@ ] || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "PYTHON (=$(PYTHON)) must be Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@[ -e $@ ] || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "PYTHON (=$(PYTHON)) lacks venv or ensurepip; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@[ -e $@ ] || $(PYTHON) -m venv --clear .venv
	@rm -f $@
	@echo "Installing into .venv: some minutes, most of them for torch ..."
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
	  $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") --editable '.[dashboard,dev,docs]'
	@touch $@

# The launchers that hpclab is measured against; some gigabytes.
.venv-peers/.ready: benchmarks/peers.txt pyproject.toml
	@$(PYTHON) -m venv --clear .venv-peers
	@echo "Installing into .venv-peers ..."
	@.venv-peers/bin/python -m pip --disable-pip-version-check install --quiet --requirement $< --editable . \
	  $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)")
	@touch $@

# Not made yet, or the Python behind it is gone.
$(BIN)/python:
	@rm -f $(READY)
