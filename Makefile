# Every target creates the virtual environment first; it needs Python only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALLED := $(VENV)/.installed
OLDEST := .venv-oldest

SECONDS ?= 60

.PHONY: help demo fuzz gpu paper paper-quick recipes storm test test-all test-oldest dist lint types tests
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## draw a data set, train a small detector on it, print its metrics (five minutes on a CPU)
	$(BIN)/python datasets/make_shapes.py --out datasets/shapes --size 160 160 --classes disk square triangle star
	$(BIN)/python tools/train.py experiment=demo

paper: $(READY) ## the FPN paper's tables at a small scale, three seeds: docs/paper.md (at most 3 hours on two cores)
	$(BIN)/python tools/paper.py

paper-quick: $(READY) ## FPN, bottom-up and C5 only, one seed (at most 30 minutes)
	$(BIN)/python tools/paper.py quick=true output=runs/paper

recipes: $(READY) ## ingredients of recipes on BCCD and drawn shapes, two seeds: docs/recipes.md (about six hours on two cores)
	$(BIN)/python -m pip install --quiet --editable '.[dev,timm]'
	$(BIN)/python tools/recipes.py $(if $(BCCD),bccd=$(BCCD))

storm: $(READY) ## kill a run at thirty random moments, on one rank and on two, and compare it with an undisturbed run (minutes)
	$(BIN)/python tools/storm.py

fuzz: $(READY) ## damaged files, settings and command lines, SECONDS=60 for each kind, from other seeds each time
	FPN_DET_FUZZ_SECONDS=$(SECONDS) FPN_DET_FUZZ=20 FPN_DET_FUZZ_SEED=$(shell date +%s) $(BIN)/python -m pytest -n 2 tests -k "fuzz or mutated"

test: lint types tests ## lint, types and the tests without the slow ones, as in CI

test-all: lint types $(READY) ## lint, types and all tests that need no GPU
	$(BIN)/python -m pytest -n 2 -m "not gpu"

test-oldest: $(OLDEST)/.ready ## the tests with the oldest versions that setup.py admits, in an environment of its own (6 GB)
	$(OLDEST)/bin/python -m pytest -n 2

gpu: $(READY) ## the gpu tests, the benchmark and a short training; the figures go to docs/gpu.md
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu: expected a CUDA device, torch sees none here.")'
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python tools/gpu.py

dist: $(READY) ## build sdist and wheel, install the wheel into an empty environment, train and predict with it
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_dist.py

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## mypy
	$(BIN)/mypy

tests: $(READY)
	$(BIN)/python -m pytest -n 2

# As README installs it.
$(INSTALLED): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[timm]'
	@touch $@

$(READY): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# pip has no such resolution.
$(OLDEST)/.ready: setup.py
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	VIRTUAL_ENV=$(OLDEST) $(OLDEST)/bin/uv pip install --resolution lowest-direct --editable '.[dev]'
	@touch $@
