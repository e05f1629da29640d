# Everything a newcomer types. Needs python3 >= 3.11 with venv, make, and the package registry; `make PYTHON=...` picks another.
# Each target makes the virtual environment it needs and reuses it until pyproject.toml changes.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
ARGS ?=

# S3, SQS and the like for the tests: stand-ins of AWS, apart because they pin a botocore of their own.
AWS := .venv-aws
STANDINS := 'ministack>=1.5.33' 'moto[server]>=5.2.5'

.PHONY: help demo test bench lint format clean
.DEFAULT_GOAL := help

help:  ## This list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 14

demo: $(VENV)/.core  ## Starts a server with a webhook, sends it events, and shows the runs
	$(BIN)/eventflow demo$(if $(ARGS), $(ARGS))

test: $(VENV)/.dev $(AWS)/.made  ## The whole test suite, on real parts
	$(BIN)/python -m pytest -n 2 $(ARGS)

bench: $(VENV)/.dev  ## The measures of docs/benchmarks.md; ARGS="W1 --quick" picks
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(VENV)/.dev  ## Style, types, and the floors of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## Puts the code in the house's form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Removes the virtual environments and everything built
	rm -rf $(VENV) $(AWS) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache .eventflow
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "expected python3 >= 3.11 on the PATH, found none; on Debian: apt install python3 python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml | $(BIN)/python
	$(PIP) install --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP) install --editable '.[dev]'
	@touch $@ $(VENV)/.core

$(AWS)/.made: Makefile | $(BIN)/python
	test -x $(AWS)/bin/python || $(BIN)/python -m venv $(AWS)
	$(AWS)/bin/python -m pip --disable-pip-version-check --quiet install $(STANDINS)
	@touch $@
