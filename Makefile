# Each target sets up its own environment in .venv when that is missing or out of date.
# PYTHON=/path/to/python3 make ...   chooses the interpreter that .venv is made from (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := test,docs,examples
SOURCES := smoothops implicit tests examples docs

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench docs figures lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## learn to sort handwritten digits (examples/sort_digits.py)
	$(BIN)/python examples/sort_digits.py

test: $(STAMP) ## the tests, without the slow part of the registry
	$(BIN)/python -m pytest -n 2

test-all: $(STAMP) ## every test
	$(BIN)/python -m pytest -n 2 --full

bench: $(STAMP) ## time against torch and other libraries; rewrites docs/benchmarks.md (BENCH=--quick: under a minute)
	$(BIN)/python -m tests.bench $(BENCH)

docs: $(STAMP) ## build the documentation site; open build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --config-file .mkdocs.yml
	@echo "open build/site/index.html"

figures: $(STAMP) ## redraw the figures of the documentation and write the operator pages from the docstrings
	$(BIN)/python docs/figures.py
	$(BIN)/python docs/operator_pages.py

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and all build products
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# An existing environment is updated in place; the stamp is written only after a complete installation.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}; name another one: make PYTHON=/path/to/python3")'
	@echo "[1/2] environment: $(VENV), made from $(PYTHON)"
	@test -x $(BIN)/python || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	@echo "[2/2] installing smoothops and its dependencies; torch is the long one, a few minutes the first time"
	$(BIN)/python -m pip install -e '.[$(EXTRAS)]' -c constraints.txt
	@touch $@
