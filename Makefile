# `make demo` shows what tinkex does, `make test` runs the tests, `make help` lists all targets.
PYTHON ?= python3

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --use-pep517 -c constraints.txt
INSTALLED_BY := setup.py setup.cfg constraints.txt

# One test process more than processors (tests/conftest.py), at most 8. Each starts with a block of the
# tests and takes over tests from the others when it has finished. JOBS=0 runs all in one, for a debugger.
JOBS ?= logical
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow coverage check lint types docs core conformance cookbook bench profile chaos audit load dist hooks clean browser screenshots clients examples scaling llama

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

MODEL ?= smollm2
demo: $(if $(LOCKED),.venv/locked,.venv/local) ## fine-tune SmolLM2, show answers before and after (MODEL=tiny: seconds, no download; LOCKED=1: only packages of known hashes)
	$(BIN)/python -m tinkex.cli.demo build/demo $(MODEL)

test: .venv/test ## run the tests in minutes (a part: ARGS='tests/runtime -k retry')
	$(PYTEST) -m 'not slow' --ignore tests/test_docs.py --ignore tests/browser --ignore tests/openai_clients $(ARGS)

test-slow: .venv/test ## run the tests marked slow: more seeds, more versions, larger data
	$(PYTEST) -m slow -rs --ignore tests/test_docs.py --ignore tests/browser --ignore tests/openai_clients $(ARGS)

llama: .venv/test ## build llama-cpp-python for the tests of GGUF export (10 minutes, kept by pip)
	$(BIN)/python -m tests.support.llama_cpp

# --tb=line: with longer reports, Python 3.11 may end a test process in which a test fails while another
# thread logs an exception (both parse source code: https://github.com/python/cpython/issues/106905).
coverage: .venv/test ## run the tests and report which lines and branches they reach
	rm -rf build/coverage && mkdir -p build/coverage
	$(PYTEST) -m 'not slow' --ignore tests/test_docs.py --ignore tests/browser --ignore tests/openai_clients --cov --cov-report= --tb=line $(ARGS); \
	tests=$$?; $(BIN)/python -m tests.coverage_figures build/coverage/report.json && exit $$tests

check: lint types test docs core ## run everything that must pass before a change is done

lint: .venv/test ## check rules and format with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test ## check the types with mypy
	$(BIN)/mypy

docs: .venv/test ## run the examples in README.md and docs/, compare help texts with the program
	$(BIN)/python -m pytest tests/test_docs.py

examples: .venv/test ## run the programs in docs/examples, print how long each takes
	rm -rf build/examples
	$(BIN)/python tests/test_examples.py build/examples

core: .venv/test ## install without extras under each Python from 3.10 to 3.13 there is
	$(BIN)/python tests/check_core_install.py build/core

browser: .venv/browser ## try the web page in chromium (Debian: apt install chromium chromium-driver)
	$(BIN)/python -m pytest tests/browser $(ARGS)

clients: .venv/test ## run litellm, lm-eval and inspect-ai, in a venv of their own, against our server
	$(BIN)/python -m pytest tests/openai_clients $(ARGS)

scaling: .venv/test ## run SkyRL and TuFT (7 GB of packages, no GPU) with tinkex, write docs/scaling.md (ARGS='skyrl')
	$(BIN)/python -m tests.scaling $(ARGS)

screenshots: .venv/browser ## take the pictures of the web page in docs/
	BROWSER_SCREENSHOTS=docs $(BIN)/python -m pytest tests/browser -k the_page_fits

conformance: .venv/test ## run five versions of the official SDK against our server, write docs/compatibility.md
	$(BIN)/python -m tests.official_sdk.run $(ARGS)

cookbook: .venv/test ## run recipes of tinker-cookbook with both SDKs against our server (ARGS='tinkex sl_loop')
	$(BIN)/python -m tests.official_sdk.cookbook $(ARGS)

bench: .venv/bench ## measure client and engine, write docs/benchmarks.md, show what moved (a part: ARGS=client)
	$(BIN)/python -m tests.benchmarks $(ARGS)

profile: .venv/bench ## draw flame graphs of a training step, a decode step, a client call (ARGS=step)
	$(BIN)/python -m tests.benchmarks.profiles $(ARGS)

SEEDS ?= 3
chaos: .venv/test ## break network, server and client on purpose, write docs/reliability.md (SEEDS=50)
	rm -f build/chaos.jsonl && mkdir -p build
	SEEDS=$(SEEDS) SERVER_KILLS=30 CLIENT_KILLS=20 CHAOS_REPORT=build/chaos.jsonl \
	    $(BIN)/python -m pytest tests/chaos $(ARGS)
	$(BIN)/python -m tests.chaos.summary build/chaos.jsonl docs/reliability.md

audit: .venv/test ## look for known vulnerabilities of dependencies (pip-audit) and dangerous calls (bandit)
	$(BIN)/python -m tests.audit build/audit

load: .venv/bench ## run eight clients and 2,000 samples at once for ten minutes, draw docs/load.png
	$(BIN)/python -m tests.chaos.load $(ARGS)
	$(BIN)/python -m tests.chaos.load --draw docs/load.png
	$(BIN)/python -m tests.chaos.neighbour

dist: .venv/test ## build wheel and sdist into dist/, try the wheel in an empty environment
	$(BIN)/python -m tests.check_dist dist build/dist

hooks: .venv/test ## check each git commit with ruff and mypy before it is made
	$(PIP) pre-commit
	$(BIN)/pre-commit install

clean: ## remove what make made
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Empty files that mark an installation as done. A target is installed again only when one of the
# files that describe the installation is newer. The package itself is linked (pip -e), so changes
# to it take effect at once.
.venv/made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tinkex needs Python 3.10 or newer, this is %s; choose another: make PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/local: .venv/made $(INSTALLED_BY)
	$(PIP) -e '.[local]'
	@touch $@

# Only packages whose hashes stand in demo.lock. They include the libraries of CUDA on Linux.
.venv/locked: .venv/made demo.lock
	$(BIN)/python -m pip --disable-pip-version-check install --require-hashes -r demo.lock
	$(PIP) --no-deps -e .
	@touch .venv/local $@

.venv/test: .venv/made $(INSTALLED_BY)
	$(PIP) -e '.[local,data,test]'
	@touch .venv/local $@

.venv/browser: .venv/test
	$(PIP) -e '.[local,data,test,browser]'
	@touch .venv/local .venv/test $@

.venv/bench: .venv/test
	$(PIP) -e '.[local,data,test,bench]'
	@touch .venv/local .venv/test $@
