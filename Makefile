# `make help` lists the targets. Linux, Python 3.11 or newer and pip are all that is needed to start with.
#   PYTHON=/path/to/python3.12   interpreter for .venv
#   PIP_ARGS="..."               added to pip install: another index, say, that has the small CPU build of torch
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime
DEV := $(VENV)/.dev
PYTEST := $(BIN)/python -m pytest -q --no-header -rfEs
# those on a cluster stay alone: one of them has as many processes as a small machine can bear
SIDE_BY_SIDE := -n 2
SOURCES := $(shell find hpcft -name '*.py' -o -name '*.sbatch' 2>/dev/null)
say = @printf '\n== %s\n' "$(1)"

# The stamps say with which pyproject.toml and constraints.txt the environment was made.
$(RUNTIME): pyproject.toml constraints.txt tools/venv
	@tools/venv $(VENV)
	@touch $@

$(DEV): pyproject.toml constraints.txt tools/venv
	@tools/venv $(VENV) dev
	@touch $(RUNTIME) $@

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: $(RUNTIME) ## train a small GPT on two virtual nodes; one worker is killed on the way
	@$(BIN)/python -m hpcft.examples.text data/topics
	@rm -rf runs/demo
	@$(BIN)/hpcft run configs/demo.toml

.PHONY: test
test: $(DEV) ## everything: set-up, check, and all tests, those on a real Slurm cluster included
	@tools/slurm-packages
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory binary
	$(call say,unit and scenario tests)
	@$(PYTEST) $(SIDE_BY_SIDE) -m "not local and not slurm and not drill"
	$(call say,end to end on this machine)
	@$(PYTEST) $(SIDE_BY_SIDE) -m "local and not slurm and not drill"
	$(call say,end to end on a real Slurm cluster)
	@$(PYTEST) -m "slurm and not drill"

.PHONY: check
check: $(DEV) ## format, lint, types, import layers
	$(call say,format and lint)
	@$(BIN)/ruff format --check --quiet . || { echo "run: make format"; exit 1; }
	@$(BIN)/ruff check --quiet .
	$(call say,types)
	@$(BIN)/mypy
	$(call say,import layers)
	@$(BIN)/lint-imports --no-logo

.PHONY: format
format: $(DEV) ## format the code and fix what lint can fix
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

.PHONY: drills
drills: $(DEV) ## the long campaigns (hours); results go to docs/drills/
	@tools/slurm-packages
	@$(BIN)/python tools/drills.py

.PHONY: binary
binary: dist/hpcft ## dist/hpcft: one executable file with everything but torch inside

dist/hpcft: $(DEV) $(SOURCES) tools/binary.py tools/binary_main.py
	@$(BIN)/python tools/binary.py $@

.PHONY: docs
docs: $(DEV) ## rewrite the generated pages of docs/
	@$(BIN)/python -m hpcft.config >docs/configuration.md
	@$(BIN)/python tools/cli_reference.py >docs/cli.md
	@PYTHONPATH=. $(BIN)/python tools/state_diagram.py

.PHONY: clean
clean: ## remove everything that make has made
	rm -rf $(VENV) build dist data runs/demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
