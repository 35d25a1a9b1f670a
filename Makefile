# Every target prepares what it needs: only Python 3.11+ and make must be installed.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test coverage lint docs clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/python cli.py demo --out $(DEMO)

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

coverage: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term --cov-report=xml

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf .venv $(DEMO) .coverage coverage.xml site
