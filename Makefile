# Everything a person needs: `make demo` to see it work, `make test` to trust it, `make help` for the rest.
PYTHON ?= python3

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --use-pep517 -c constraints.txt
INSTALLED_BY := setup.py setup.cfg constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types docs core conformance bench chaos load clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/local ## fine-tune the built-in model on the docstrings of your Python (offline, no key)
	$(BIN)/python -m tinkex.cli.demo build/demo

test: .venv/test ## run the tests
	$(BIN)/python -m pytest --ignore tests/test_docs.py $(ARGS)

check: lint types test docs core ## all that must pass before a change is done

lint: .venv/test ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test ## mypy
	$(BIN)/mypy

docs: .venv/test ## run the examples in README.md and docs/, compare help texts with the program
	$(BIN)/python -m pytest tests/test_docs.py

core: .venv/test ## install without extras under each Python 3.10, 3.12, 3.13 there is
	$(BIN)/python tests/check_core_install.py build/core

conformance: .venv/test ## try five versions of the official SDK on our server, write docs/compatibility.md
	$(BIN)/python -m tests.official_sdk.run $(ARGS)

bench: .venv/bench ## measure client and engine as ratios, write docs/benchmarks.md
	$(BIN)/python -m tests.benchmarks $(ARGS)

SEEDS ?= 3
chaos: .venv/test ## break network, server and client on purpose, write docs/reliability.md (SEEDS=50)
	rm -f build/chaos.jsonl && mkdir -p build
	SEEDS=$(SEEDS) SERVER_KILLS=30 CLIENT_KILLS=20 CHAOS_REPORT=build/chaos.jsonl \
	    $(BIN)/python -m pytest tests/chaos $(ARGS)
	$(BIN)/python -m tests.chaos.summary build/chaos.jsonl docs/reliability.md

load: .venv/bench ## eight clients and 2,000 samples at once for ten minutes, draw docs/load.png
	$(BIN)/python -m tests.chaos.load $(ARGS)
	$(BIN)/python -m tests.chaos.load --draw docs/load.png

clean: ## remove what make made
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Empty files that say "installed": while they are newer than what describes the installation,
# nothing is installed again. The package itself is linked, so changes to it are seen at once.
.venv/made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tinkex needs Python 3.10 or newer, this is %s; say which: make PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/local: .venv/made $(INSTALLED_BY)
	$(PIP) -e '.[local]'
	@touch $@

.venv/test: .venv/made $(INSTALLED_BY)
	$(PIP) -e '.[local,test]'
	@touch .venv/local $@

.venv/bench: .venv/test
	$(PIP) -e '.[local,test,bench]'
	@touch .venv/local .venv/test $@
