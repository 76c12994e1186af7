# Two commands set everything up: `make demo` and `make test`.  Both work in .venv, which they make; a
# stamp named after the content of constraints.txt and pyproject.toml says what is installed there, so
# running them again installs nothing until one of the two changes.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo stop test lint bench install install-test image compiler browser servers lock clean

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
HOST ?= 127.0.0.1
PORT ?= 8000
JOBS ?= 2
IMAGE ?= ddiff:$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
BIN := .venv/bin
OLDEST := $(shell sed -n 's/^requires-python = ">=3\.\([0-9]*\)"/\1/p' pyproject.toml)
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, $(OLDEST)))'
# a .venv whose Python is too old, or gone with the system's, is made again
STALE := $(shell test ! -e .venv/bin/pip || .venv/bin/python $(NEW_ENOUGH) 2>/dev/null || echo stale)
LOCK := $(shell cat constraints.txt pyproject.toml | sha256sum | cut -c1-16)
RUNTIME := .venv/ddiff-runtime-$(LOCK)
TESTS := .venv/ddiff-test-$(LOCK)
# where PYTHONDONTWRITEBYTECODE is set, every process would compile torch and ray anew: 8 to 25 s each; pip
# compiles on one core
COMPILE := $(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true

help:  ## say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(RUNTIME) compiler  ## from nothing to a served cascade: data, seven stages, evaluation, report, endpoint
	$(BIN)/ddiff run --recipe demo --serve --host "$(HOST)" --port "$(PORT)"

stop: $(RUNTIME)  ## stop the endpoint that `make demo` left running
	$(BIN)/ddiff stop --run "$${DDIFF_STORAGE:-runs}/demo"

test: export PYTHONDONTWRITEBYTECODE :=  # a hundred processes would compile our modules anew
test: lint compiler browser servers  ## the whole suite, as CI runs it
	code=0; $(BIN)/pytest -n $(JOBS) --dist worksteal -m "not ray" || code=1; \
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m ray --ignore=tests/parity || code=1; \
	exit $$code

lint: $(TESTS)  ## ruff, formatting, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(TESTS)  ## measure data path, training step, sampling, submission and a whole run; most figures in runs/bench
	mkdir -p runs/bench
	$(BIN)/python -m tests.benchmarks.data --json runs/bench/data.json
	for batch in 16 8 1; do \
		$(BIN)/python -m tests.benchmarks.train_step --batch $$batch --json runs/bench/train_step_$$batch.json || exit 1; done
	for batch in 8 1; do \
		$(BIN)/python -m tests.benchmarks.train_step --batch $$batch --compile \
			--json runs/bench/train_step_compiled_$$batch.json || exit 1; done
	$(BIN)/python -m tests.benchmarks.sampling --json runs/bench/sampling.json
	$(BIN)/python -m tests.benchmarks.sampling --compile --json runs/bench/sampling_compiled.json
	$(BIN)/python -m tests.benchmarks.submission
	$(BIN)/python -m tests.benchmarks.whole --recipe smoke --json runs/bench/whole.json

install: $(RUNTIME)  ## .venv with what training and serving need

install-test: $(TESTS)  ## .venv with what the tests need besides

image:  ## the image that the manifests name, where Docker runs; IMAGE=REGISTRY/ddiff:0.1.0 for a registry
	@command -v docker >/dev/null || { echo "no docker here; run make image where Docker is installed"; exit 2; }
	@docker version >/dev/null || { echo "no Docker daemon answers; start one and run make image again"; exit 2; }
	docker build --file jobs/cluster/Dockerfile --tag "$(IMAGE)" .

compiler:  ## gcc for the loops that a CPU runs (dd_core/nets/norm.c), where apt-get can bring it
	@if command -v gcc >/dev/null; then exit 0; fi; \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  (apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev) \
	    >/dev/null 2>&1 || echo "gcc could not be installed; training on a CPU takes up to 1.5 times as long"; \
	else echo "no gcc here; training on a CPU takes up to 1.5 times as long"; fi

browser:  ## a headless Chromium for tests/browser, where apt-get can bring one
	@if command -v chromium >/dev/null || command -v google-chrome >/dev/null; then exit 0; fi; \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core) \
	    >/dev/null 2>&1 || echo "chromium could not be installed; the tests in tests/browser will be skipped"; \
	else echo "no chromium here; the tests in tests/browser will be skipped"; fi

servers:  ## PostgreSQL for the tests that start a cluster, where apt-get can bring it
	@if command -v pg_ctl >/dev/null || ls /usr/lib/postgresql/*/bin/pg_ctl >/dev/null 2>&1; then exit 0; fi; \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  (apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql iproute2) \
	    >/dev/null 2>&1 || echo "PostgreSQL could not be installed; the tests on a cluster will be skipped"; \
	else echo "no PostgreSQL here; the tests on a cluster will be skipped"; fi

lock: $(TESTS)  ## pin what is installed now, with every extra
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[test,gcs]'
	$(BIN)/pip freeze --exclude-editable | sed -E 's/\+[[:alnum:].]+$$//' | grep -E '^[^@ ]+==' > constraints.txt

clean:  ## remove .venv and runs; endpoints are stopped first
	for note in runs/*/endpoint.json "$${DDIFF_STORAGE:-runs}"/*/endpoint.json; do \
	  if [ ! -e "$$note" ]; then continue; fi; \
	  if [ -x $(BIN)/ddiff ]; then $(BIN)/ddiff stop --run "$${note%/endpoint.json}"; \
	  else echo "no $(BIN)/ddiff to stop the endpoint in $$note; its process may still run: $$(cat "$$note")"; \
	  fi; done
	rm -rf .venv runs

.PHONY: stale
stale:

.venv/bin/pip: $(STALE)
	@test -n "$(PYTHON)" || \
	  { echo "no python3 found; install Python 3.$(OLDEST) or newer, or name it: make PYTHON=..."; exit 2; }
	@$(PYTHON) $(NEW_ENOUGH) || \
	  { echo "$(PYTHON) is too old: ddiff needs Python 3.$(OLDEST) or newer; install one or name it:" \
	    "make PYTHON=..."; exit 2; }
	rm -rf .venv
	$(PYTHON) -m venv .venv

$(RUNTIME): $(STALE) | .venv/bin/pip
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e .
	$(COMPILE)
	@touch $@

$(TESTS): $(STALE) | .venv/bin/pip
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(COMPILE)
	@touch $(RUNTIME) $@
