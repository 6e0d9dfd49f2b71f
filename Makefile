# README's two commands are `make run` and `make test`; both do all of their own set-up in .venv.
PYTHON ?= python3
BIN := .venv/bin
# What is compiled on installing.
COMPILED := hatch_build.py estimators/whichlora_estimators/replay.c

.PHONY: run test lint check docs clean

run: .venv/base
	$(BIN)/whichlora pick examples/first.yaml --out out/first

test: .venv/full
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations 15

# Everything that must hold beside the tests: format, lint, types, import contracts, current docs.
lint: .venv/full
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

check: lint test

docs: .venv/full
	$(BIN)/python docs/generate.py

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip

.venv/base: .venv/bin/python pyproject.toml $(COMPILED)
	$(BIN)/python -m pip install -q -e .
	touch $@

# torch first and by itself: its CUDA build is what the null device needs.
.venv/full: .venv/bin/python pyproject.toml constraints.txt $(COMPILED)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[gpu,dev]'
	touch $@ .venv/base

clean:
	rm -rf .venv out build dist
