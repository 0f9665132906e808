# Every target makes .venv itself; nothing needs to be installed globally but Python 3.11+ with pip.
PYTHON ?= python3
export PYTHON

BIN := .venv/bin
VENV := .venv/.ready
DOCS := .venv/.ready-docs
PINS := pyproject.toml constraints.txt tools/venv

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format bench docs clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

venv: $(VENV)  ## install gradmark and its tools into .venv

demo: $(VENV)  ## mark a small network, attack it, judge it; report in demo-out/
	$(BIN)/gradmark demo --out demo-out

test: $(VENV)  ## run the tests and doctests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

lint: $(VENV)  ## check style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)  ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)  ## run the benchmark suite
	$(BIN)/python benchmarks/run.py

docs: $(DOCS)  ## build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

clean:  ## remove what the other targets made, but for .venv
	rm -rf demo-out docs/_build dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV): $(PINS)
	sh tools/venv all,dev
	@touch $@

$(DOCS): $(VENV)
	sh tools/venv all,dev,docs
	@touch $@
