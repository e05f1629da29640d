# The commands of a developer. Needs python3 >= 3.11 with venv, make, and the package registry; `make PYTHON=...` picks another.
# Each target makes the virtual environment it needs and reuses it until pyproject.toml changes.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
ARGS ?=

# Local AWS services (S3, SQS) for the tests, in another environment because they pin botocore.
AWS := .venv-aws
AWS_PACKAGES := 'ministack>=1.5.33' 'moto[server]>=5.2.5'

# Tests that ARGS picks by path need the local AWS services only if a file of them uses these.
PICKED := $(foreach each,$(filter tests/%,$(ARGS)),$(firstword $(subst ::, ,$(each))))
NEEDS_AWS := $(if $(PICKED),$(shell grep -rlE --include='*.py' 'tests\.aws|triggers\.buckets' $(PICKED)),all)

.PHONY: help demo test soak bench lint format clean
.DEFAULT_GOAL := help

help:  ## Print this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 14

demo: $(VENV)/.core  ## Run `eventflow demo`: real parts, a kill -9, and checks of the result
	$(BIN)/eventflow demo$(if $(ARGS), $(ARGS))

test: $(VENV)/.dev $(if $(NEEDS_AWS),$(AWS)/.made)  ## Run the whole test suite
	$(BIN)/python -m pytest -n 2 $(ARGS)

soak: $(VENV)/.dev $(AWS)/.made  ## Run mixed traffic for 10 minutes; ARGS="--minutes 1"
	$(BIN)/python -m tests.soak $(ARGS)

bench: $(VENV)/.dev  ## Run the benchmarks of docs/benchmarks.md; ARGS="W1 --quick" picks
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(VENV)/.dev  ## Check style, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environments and everything built
	rm -rf $(VENV) $(AWS) .venv-peers build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache .eventflow
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
	$(AWS)/bin/python -m pip --disable-pip-version-check --quiet install $(AWS_PACKAGES)
	@touch $@
