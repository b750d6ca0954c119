# Commands for users, developers and CI. `make` without a target lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := $(VENV)/.packages
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install gguf demo demo-serve ui test test-all bench models drills deps lint types docs lock clean
.DELETE_ON_ERROR:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv with exactly the versions in requirements.lock

.PHONY: packages
packages: $(PACKAGES) ## Create .venv without this project: the slow part of `make install`

gguf: install ## Compile llama.cpp and its server for the target gguf (15 to 30 minutes; needs a C++ compiler and cmake)
	@$(BIN)/python -m tasks.environments llama-cpp
	@$(BIN)/python -m tasks.serving.llama_server

demo: install ## Quantize the built-in model four ways and prove the result (about 15 minutes on 2 cores)
	@$(BIN)/modelpress run

demo-serve: demo ## Serve the demo's baseline and winner with vLLM and ONNX Runtime, under load (about 25 minutes more)
	@$(BIN)/modelpress run --winner --set 'targets=[vllm,onnx]'

test-all: install ## Run all tests, including those that take minutes: a real model, a cluster
	@$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --run-slow

ui: install ## Serve the UIs of Prefect and MLflow on this machine, with a worker; Ctrl-C stops them
	@$(BIN)/modelpress serve

test: install ## Run the tests (about 10 minutes on 2 cores)
	@$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: install ## Quantize with our solvers and with the libraries, and compare (about 40 minutes on 2 cores)
	@PATH="$(CURDIR)/$(BIN):$$PATH" dvc repro calibrate
	@$(BIN)/python -m bench

models: install ## Press a tiny model of every type that Transformers knows, and write docs/models.md (about 15 minutes)
	@$(BIN)/python -m tools.models

drills: install ## Break runs in every known way and check that nothing is lost (about 12 minutes)
	@$(BIN)/python -m tests.drills

deps: install ## Update each stage's code dependencies in dvc.yaml from the imports
	@$(BIN)/python -m tools.deps

lint: install ## Check style, formatting and import layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo

types: install ## Check types
	@$(BIN)/mypy

docs: install ## Build the documentation into site/ and check its links and anchors
	@# without --quiet, which would hide the warnings from --strict as well
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lock: install ## Resolve the dependencies in pyproject.toml to requirements.lock
	$(BIN)/pip-compile --quiet --allow-unsafe --strip-extras --extra tasks --extra bundle --extra serve --extra dask --extra s3 --extra dev --no-header \
	  --no-emit-index-url --no-emit-find-links --output-file requirements.lock pyproject.toml
	@# torch's CPU build differs from the index's only in the local version: let both satisfy the lock; don't pin pip
	sed -i -e 's/^\(torch==[^+ ]*\)+[a-z0-9.]*/\1/' -e '/^pip==/{N;d}' requirements.lock

clean: ## Remove the environment and the tools' caches; keep models, results and records
	rm -rf $(VENV) site .mypy_cache .ruff_cache .import_linter_cache .pytest_cache *.egg-info
	find flows tasks evals bench tools tests -name __pycache__ -type d -exec rm -rf {} +

# each stamp is written last, so an interrupted installation is repeated
$(STAMP): $(PACKAGES) pyproject.toml
	@$(BIN)/pip install -qq --no-deps --editable .
	@touch $@

$(PACKAGES): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: found $$($(PYTHON) --version 2>&1), but Python 3.11 or newer is needed; install it, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv module; install it (on Debian: apt install python3-venv)" >&2; exit 1; }
	@echo "installing into $(VENV) (about 3 GB, a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --requirement requirements.lock
	@touch $@
