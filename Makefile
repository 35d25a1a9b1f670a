# Every target prepares what it needs: only Python 3.11+ and make must be there.
PYTHON ?= python3
BIN := .venv/bin
NANO := examples/nano
DEMO := demo

.PHONY: demo test lint clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/python cli.py demo --out $(DEMO)

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv $(DEMO)
