# Every command of the README, as one word. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(VENV)/.run-ready
DEV := $(VENV)/.dev-ready
# Tests run side by side; two workers suit two cores.
WORKERS ?= 2

.PHONY: help demo dev test check bench chaos openapi lock format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(RUN) ## A credential issued, used, killed and proven dead, in one story
	@$(BIN)/nhi demo

dev: $(RUN) ## The same parts, started and kept running
	@$(BIN)/nhi dev

test: $(DEV) ## The whole test suite, against real parts
	@$(BIN)/pytest -n $(WORKERS) --dist loadgroup

check: $(DEV) ## Format, lint, types, import contracts, secret scan, dependency audit
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --baseline .secrets.baseline
	@$(BIN)/python .ci/audit_dependencies.py

bench: $(DEV) ## Speed, as a table and benchmarks/results.json
	@$(BIN)/python -m benchmarks.run

chaos: $(DEV) ## Kill the broker over and over; use every credential afterwards
	@$(BIN)/python -m benchmarks.chaos

openapi: $(DEV) ## Regenerate the committed OpenAPI documents
	@$(BIN)/python -m broker.api.openapi

format: $(DEV) ## Format and fix what can be fixed
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lock: ## Resolve the dependencies anew (needs uv)
	@for extra in serve demo dev; do \
	  uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	    --no-emit-package nhi-sdk --no-emit-package nhi-broker --custom-compile-command "make lock" \
	    $$([ $$extra = serve ] || echo --extra $$extra) pyproject.toml --output-file requirements/$$extra.txt; \
	done

clean: ## Remove the environment and caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(RUN): requirements/demo.txt pyproject.toml sdk/pyproject.toml
	@echo "Setting up the environment (once) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/demo.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e sdk -e .
	@touch $@

$(DEV): $(RUN) requirements/dev.txt
	@echo "Setting up the tools (once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@touch $@
