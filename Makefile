# make env | quickstart | test-quick | test | test-install | test-agents | test-full | check      Needs Python 3.11 or 3.12, pip and make; no GPU.
#
# The environment is .venv; it is updated when a file with pins changes. Another Python: make env PYTHON=/path/to/python3.12

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
SERVER_PINS := torchrl_sglang/server/cpu_requirements.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# The first of these that is 3.11 or 3.12; the pinned wheels are made for them.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo "$$p" && break; done)

.PHONY: help env quickstart test-quick test test-install test-agents test-full test-torchrl-nightly check format clean

help:
	@echo "make quickstart  environment, then a language model trained with GRPO against a real SGLang server (no GPU);"
	@echo "                 once more: make quickstart ARGS=--overwrite"
	@echo "make test-quick  the tests to run while editing: no server, no Ray (about a minute on 2 cores)"
	@echo "make test        environment, checks, tests (about 13 minutes on 2 cores)"
	@echo "make test-install  the first hour of a new user: the wheel, each extra, the CPU server, the examples (about 20 minutes)"
	@echo "make test-agents  agent frameworks from the registry, through the gateway (about 15 minutes, mostly downloads)"
	@echo "make test-full   make test, test-install, test-agents, TorchRL 0.13 and its nightly build (reported only), the slow tests (another 45)"
	@echo "make chaos       ten minutes of training while things go wrong; make soak: an hour, does anything grow?"
	@echo "make bench       ratios to raw broadcasts, requests and launches (25 minutes, on an idle machine); ARGS=--quick: 2 minutes"
	@echo "make check       lint, format, types, architecture"
	@echo "make docs        the documentation site, in site/index.html (under a minute)"
	@echo "make tutorials   run the tutorials and render their pages again (about seven minutes)"
	@echo "make env         only the environment (.venv, 2 GB)"

env: $(VENV)/.ready

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or 3.12 is needed; name one with PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "env 1/4  $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV)

# torch is installed first and with its dependencies: pip takes the CPU build where the index has one, else the CUDA
# build, which works too but needs its libraries. Its version is the one in the server pins.
$(VENV)/.torch: $(SERVER_PINS) | $(BIN)/python
	@echo "env 2/4  $$(grep '^torch==' $(SERVER_PINS)) (minutes on a slow line)"
	@$(PIP) install --constraint $(SERVER_PINS) torch
	@touch $@

$(VENV)/.pins: requirements.txt $(SERVER_PINS) $(VENV)/.torch
	@echo "env 3/4  $$(cat requirements.txt $(SERVER_PINS) | grep -c ==) pinned packages"
	@$(PIP) install --no-deps --no-compile --requirement requirements.txt --log $(VENV)/pip.log 2>&1 | awk '\
		/^Collecting/ && ++n % 20 == 0 { print "         " n " found"; fflush() } \
		/^Installing/ { print "         installing"; fflush() } \
		/^ERROR|^error/ { print; print "         (details are in $(VENV)/pip.log)" }'
	@touch $@

$(VENV)/.ready: pyproject.toml $(VENV)/.pins
	@echo "env 4/4  torchrl-sglang itself"
	@$(PIP) install --quiet --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c 'import torch, torchrl, tensordict, transformers, torchrl_sglang; print("env ready: torch", torch.__version__, "torchrl", torchrl.__version__, "transformers", transformers.__version__)'
	@touch $@

quickstart: env
	@CUDA_VISIBLE_DEVICES= $(BIN)/python examples/grpo.py $(ARGS)

check: env
	@echo "check 1/4  ruff check";    $(BIN)/ruff check --quiet .
	@echo "check 2/4  ruff format";   $(BIN)/ruff format --quiet --check .
	@echo "check 3/4  mypy --strict"; $(BIN)/mypy --no-error-summary
	@echo "check 4/4  architecture";  $(BIN)/python -m pytest -q tests/test_architecture.py

# The tests to run while editing: no server, no Ray. One thread each, because two workers use both cores.
QUICK := tests/test_architecture.py tests/quick torchrl_sglang
test-quick: env
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(QUICK)

# The checks come first, so that pytest's summary is printed last. Two files run at a time, because a server that
# starts and a test that waits use only half of the machine; tests/conftest.py says which files share a worker.
test: env
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target check docs test-torchrl-0.12
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# In environments of its own, which pip resolves without our pins.
test-install:
	@"$(PYTHON)" tests/install/first_hour.py

# Unmodified agent frameworks from the registry, each in an environment of its own, against a real server.
test-agents: env
	@$(BIN)/python -m pytest -m agents tests/agents

test-full: test test-torchrl-0.13 test-torchrl-nightly test-install test-agents
	@$(BIN)/python -m pytest -m slow

# The tests that call TorchRL, with an older release of it first on the import path.
test-torchrl-%: $(VENV)/torchrl-%/.ready
	@echo "test  $$(paste -sd' ' tests/torchrl-$*.txt)"
	@PYTHONPATH=$(VENV)/torchrl-$* $(BIN)/python -c 'import torchrl; assert torchrl.__version__.startswith("$*."), torchrl'
	@PYTHONPATH=$(VENV)/torchrl-$* $(BIN)/python -m pytest -q -m torchrl

.PRECIOUS: $(VENV)/torchrl-%/.ready
$(VENV)/torchrl-%/.ready: tests/torchrl-%.txt $(VENV)/.ready
	@rm -rf $(@D)
	@$(PIP) install --quiet --quiet --no-deps --target $(@D) --requirement $<
	@touch $@

# The same with TorchRL's nightly build: prints the result, never fails the build. Downloaded again each time.
NIGHTLY := $(VENV)/torchrl-nightly
test-torchrl-nightly: $(VENV)/.ready
	@rm -rf $(NIGHTLY)
	@if $(PIP) install --quiet --quiet --pre --no-deps --target $(NIGHTLY) torchrl-nightly tensordict-nightly; then \
		echo "test  $$(cd $(NIGHTLY) && ls -d *_nightly-*.dist-info | sed 's/.dist-info//' | paste -sd' ') (reported, not required to pass)"; \
		PYTHONPATH=$(NIGHTLY) $(BIN)/python -m pytest -q -m torchrl || echo "TorchRL's nightly build: some tests failed (above); this does not fail make"; \
	else echo "TorchRL's nightly build cannot be installed from this package index; skipped"; fi

# Training while servers and trainers are killed, frozen, cut off, refused...: ten minutes, or ARGS="--seconds 60 --seed 7".
chaos: env
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos $(ARGS)

# Generate and sync for an hour: does memory, the number of descriptors or threads, or latency grow?
soak: env
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak $(ARGS)

# Figures for docs/benchmarks.md, on an idle machine: ARGS=--publish writes them there, ARGS=--quick only tries all out.
bench: env
	@$(BIN)/python benchmarks/bench.py $(ARGS)

.PHONY: docs tutorials chaos soak bench

$(VENV)/.docs: docs/requirements.txt $(VENV)/.ready
	@echo "docs  $$(grep -c == docs/requirements.txt) pinned packages"
	@$(PIP) install --quiet --quiet --no-deps --requirement docs/requirements.txt
	@touch $@

# Built from scratch (-E): pages that are already built would not repeat their warnings.
docs: $(VENV)/.docs
	@$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs site
	@echo "the site is site/index.html"

tutorials: env
	@$(BIN)/python docs/render_tutorials.py run

format: env
	@$(BIN)/ruff check --quiet --fix . && $(BIN)/ruff format --quiet .

clean:
	rm -rf $(VENV) outputs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
