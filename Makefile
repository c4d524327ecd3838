# Two commands matter: `make quickstart` and `make test`. Everything runs in .venv, made on first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install quickstart smoke test test-fast lint format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed  ## .venv alone, for the scripts: .venv/bin/python -m experiments.pretrain --help

quickstart: $(VENV)/installed  ## raw documents -> one hybrid miniature -> runs/quickstart/report.html, in 25 minutes
	$(BIN)/python -m experiments.quickstart --out runs/quickstart

smoke: $(VENV)/installed  ## the same in a few steps of each stage, for continuous integration
	$(BIN)/python -m experiments.quickstart --recipe smoke --out runs/smoke

test: $(VENV)/installed-dev  ## every test, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/installed-dev  ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/installed-dev  ## ruff, pyright, and the floors (import-linter)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/installed-dev  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# Stamps: install once, and again when setup.py changes.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$$($(PYTHON) --version) is too old: 3.11 or later is needed; name one with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: setup.py | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: setup.py | $(BIN)/python
	$(PIP) --editable ".[dev]"
	@touch $(VENV)/installed $@
