# `make demo` and `make test` need Python >= 3.11, make and a package index, nothing else.
# What they install goes into .venv; a second run installs nothing.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --require-virtualenv
PACKAGES := common compression server client simulations cli

# Processes that share the tests, file by file: more than cores, as those of engines mostly wait.
# Files are begun in the order of tests/conftest.py.
WORKERS ?= 4
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The first interpreter that is new enough and can make virtual environments.
# Choose another one with `make PYTHON=/path/to/python demo`.
PYTHON = $(firstword $(foreach python,python3 python3.13 python3.12 python3.11,\
	$(shell $(python) -c 'import sys, ensurepip; sys.version_info < (3, 11) or print("$(python)")' 2>/dev/null)))

# Settings of Flower and onnxruntime: no usage reports, no dependency resolution at every run.
export FLWR_TELEMETRY_ENABLED ?= 0
export ORT_DISABLE_TELEMETRY ?= 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION ?= 1

# Tests start hundreds of processes, and each would compile every module anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-fast test-engine test-flower bench-headline bench-pruning gpu-check lint format proto fuzz fuzz-corpus clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         install what the demo needs and run it"
	@echo "make test         install everything and run the whole test suite"
	@echo "make test-fast    the tests that start no engine"
	@echo "make test-engine  the tests that start Flower, servers and agents"
	@echo "make bench-headline  bytes and accuracy beside every peer, hours; HEADLINE_ARGS=--smoke: a minute"
	@echo "make bench-pruning   accuracy against sparsity, hours; PRUNING_ARGS=--smoke: a minute"
	@echo "make gpu-check    what needs a CUDA device, in one run; says so where there is none"
	@echo "make test-flower  the tests of federations with the oldest Flower that is admitted"
	@echo "make lint         ruff and mypy"
	@echo "make format       rewrite the sources in ruff's format"
	@echo "make proto        generate the code of common/fleet_protocol/fleet.proto anew"
	@echo "make fuzz         RUNS=100000 hostile payloads against the decoder (fuzz/README.md)"
	@echo "make clean        remove .venv and caches; runs/ stays"

demo: $(VENV)/.installed-sim
	$(BIN)/prunecast demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev
	$(PYTEST)

test-fast: $(VENV)/.installed-dev
	$(PYTEST) -m "not engine"

test-engine: $(VENV)/.installed-dev
	$(PYTEST) -m engine

# Five hours of one core, in pieces as you like; docs/figures.md says what it needs.
bench-headline: $(VENV)/.installed-sim
	$(BIN)/python benchmarks/headline.py $(HEADLINE_ARGS)

# Two tasks, two hours of a core each.
bench-pruning: $(VENV)/.installed-sim
	$(BIN)/python benchmarks/pruning.py $(PRUNING_ARGS)

# Under eight minutes; writes runs/gpu-check.json. A plain `torch` has CUDA, constraints.txt's may not.
gpu-check: $(VENV)/.installed-sim
	mkdir -p runs
	$(BIN)/python benchmarks/gpu_check.py --json runs/gpu-check.json

# An environment that sees everything of .venv, with another Flower in front of it.
FLOWER := 1.41.0
FLOWER_VENV := .venv-flower-$(FLOWER)

test-flower: $(FLOWER_VENV)/.installed
	$(FLOWER_VENV)/bin/python -m pytest -m "engine or not engine" tests/engines tests/simulations \
		tests/server/federation tests/client/training tests/test_same_model_everywhere.py

$(FLOWER_VENV)/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m venv $(FLOWER_VENV)
	$(FLOWER_VENV)/bin/python -m pip uninstall --quiet --yes setuptools
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(FLOWER_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth
	$(FLOWER_VENV)/bin/python -m pip --disable-pip-version-check install --quiet flwr==$(FLOWER)
	$(FLOWER_VENV)/bin/python -m pip --disable-pip-version-check install --quiet \
		--no-deps --no-build-isolation -e .
	@touch $@

# mypy follows import names to folders; this link is the folder named prunecast.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .typecheck && ln -sfn .. .typecheck/prunecast
	MYPYPATH=.typecheck $(BIN)/mypy $(PACKAGES:%=-p prunecast.%)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.installed-dev
	$(BIN)/python common/fleet_protocol/generate.py

# Atheris and the package without extras; RUNS and FUZZ_ARGS (libFuzzer's options) may be given.
RUNS := 100000
FUZZ := .venv-fuzz/bin/python -m fuzz -max_len=1024 -timeout=600 -print_final_stats=1 $(FUZZ_ARGS)

fuzz: .venv-fuzz/.installed
	mkdir -p runs/fuzz/corpus
	$(FUZZ) -runs=$(RUNS) runs/fuzz/corpus fuzz/corpus
	@! ls runs/fuzz/findings/* 2>/dev/null || { echo "The inputs above break a promise."; exit 1; }

# What the last runs found, as few inputs as reach the same coverage, replaces the corpus.
fuzz-corpus: .venv-fuzz/.installed
	rm -rf runs/fuzz/merged && mkdir -p runs/fuzz/merged
	$(FUZZ) -merge=1 runs/fuzz/merged fuzz/corpus runs/fuzz/corpus
	rm -rf fuzz/corpus && mv runs/fuzz/merged fuzz/corpus

.venv-fuzz/.installed: pyproject.toml constraints.txt fuzz/requirements.txt
	@test -n "$(PYTHON)" || { echo "Fuzzing needs Python 3.11 to 3.13 with the venv module."; exit 1; }
	$(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/python -m pip --disable-pip-version-check install --quiet \
		-c constraints.txt -e . -r fuzz/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) .venv-fuzz .venv-flower-* .typecheck .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Prunecast needs Python 3.11 or newer with the venv module:" \
		"install it (Debian: apt-get install python3-venv) or name one: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-sim: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV): about 2 GB, some minutes, once.'
	$(PIP) install --quiet -c constraints.txt -e '.[sim]'
	@touch $@

# [dev] holds [sim], so the demo finds everything there.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV): about 2 GB, some minutes, once.'
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.installed-sim $@
