# Every target prepares what it needs: only Python 3.11+ and make must be installed.
PYTHON ?= python3
BIN := .venv/bin
PAGE := .venv/page/bin
SITE := 'import site; print(site.getsitepackages()[0])'
DEMO := demo

.PHONY: demo test coverage lint docs clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The extra ui excludes the Pillow of constraints.txt. It gets an environment of its own on top of the other one.
.venv/page/ready: .venv/ready
	$(BIN)/python -m venv .venv/page
	grep -v '^pillow==' constraints.txt > .venv/page/constraints.txt
	echo "import site; site.addsitedir('$$($(BIN)/python -c $(SITE))')" > $$($(PAGE)/python -c $(SITE))/below.pth
	$(PAGE)/python -m pip install --quiet --constraint .venv/page/constraints.txt 'ti2v-distill[ui]'
	touch $@

demo: .venv/ready
	$(BIN)/python cli.py demo --out $(DEMO)

test: .venv/ready .venv/page/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(PAGE)/python -m pytest tests/commands/test_page.py

coverage: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term --cov-report=xml

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf .venv $(DEMO) .coverage coverage.xml site
