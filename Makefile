# Needs Python 3.11 or newer and make; everything else is installed into .venv.
#   make quickstart   prepare data, train, evaluate, generate and inspect a tiny model: minutes on 2 cores
#   make test         the quick tests
# Without a GPU, torch's CPU build downloads much less: make quickstart PIP_FLAGS="--extra-index-url URL" with the URL
# that torch's installation page gives for CPU.

PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$name; break; }; done)
PIP_FLAGS ?=
JOBS ?= 2
# Each worker keeps to neighbouring tests, which share what is costly to make, until it helps another one out.
PARALLEL := -n $(JOBS) --dist worksteal
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart smoke test test-slow faults test-machines test-no-compiler test-mkl golden lint types imports \
	format schema architecture pages check clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -e 's/:.*## /\t/' | expand -t 18

quickstart: $(BIN)/.core  ## data, training, evaluation, a sample and the learned parameters, from nothing
	$(BIN)/inl train recipes/tiny.yaml
	$(BIN)/inl eval
	$(BIN)/inl generate --prompt "def " --max-new-tokens 120
	$(BIN)/inl inspect-params

smoke: $(BIN)/.core  ## the quick start's path in a minute, in a directory that is removed afterwards
	@directory=$$(mktemp -d) && trap 'rm -rf "$$directory"' EXIT && set -ex && \
	$(BIN)/inl train recipes/tiny.yaml --run-dir "$$directory/run" --set data.directory="$$directory/data" \
		--set training.steps=30 --set training.evaluation.final_tokens=8192 && \
	$(BIN)/inl eval "$$directory/run" --tokens 8192 && \
	$(BIN)/inl generate "$$directory/run" --prompt "def " --max-new-tokens 20 && \
	$(BIN)/inl inspect-params "$$directory/run"

test: $(BIN)/.dev  ## the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)  # one thread a worker: they share the cores

test-slow: $(BIN)/.dev  ## the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --ignore tests/faults $(PARALLEL)
	@$(MAKE) --no-print-directory faults

faults: $(BIN)/.dev  ## kills, failing writes, damaged files; INL_FAULT_SEED=1 tries others, INL_FAULT_SHARE=4 a quarter
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/faults $(PARALLEL)

# What other machines compute in other ways: one without a compiler has none of the operations in C++, and another
# processor adds in another order and with shorter vectors.
NUMERICAL ?= tests/golden tests/model tests/kernels tests/documents tests/inference

test-no-compiler: $(BIN)/.dev  ## the numerical tests as on a machine without a compiler
	@cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && set -x && \
	env -u CXX PATH="$(CURDIR)/$(BIN)" XDG_CACHE_HOME="$$cache" OMP_NUM_THREADS=1 \
		$(CURDIR)/$(BIN)/python -m pytest $(PARALLEL) $(NUMERICAL)

test-mkl: $(BIN)/.dev  ## the numerical tests with another processor's sums
	MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest $(PARALLEL) $(NUMERICAL)

test-machines: test-no-compiler test-mkl  ## both

golden: $(BIN)/.dev  ## train the golden loss curves again, say how far each moved, rewrite those that did (tests/golden)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.golden.record

lint: $(BIN)/.dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.dev  ## pyright
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

imports: $(BIN)/.dev  ## import-linter: imports point one way
	$(BIN)/lint-imports

format: $(BIN)/.dev  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(BIN)/.core  ## bring recipes/recipe.schema.json up to date
	$(BIN)/inl recipe schema > recipes/recipe.schema.json

architecture: $(BIN)/.dev  ## bring the picture and the list of files in docs/architecture.md up to date
	$(BIN)/python docs/architecture.py

pages: architecture  ## the same, and the tables of options, recipe keys, presets and sizes on the other pages
	$(BIN)/python docs/tables.py

check: lint types imports test  ## everything that must hold before a commit

clean:  ## remove the environment and the caches, not data/ and runs/
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are newer than what they were made from; touch pyproject.toml to install again.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "inl needs Python 3.11 or newer; found: $$(python3 --version 2>&1)." \
		"Install it, or name it: make quickstart PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "Python's venv module is missing; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(BIN)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

$(BIN)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@ $(BIN)/.core
