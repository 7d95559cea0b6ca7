# Everything a newcomer needs: `make serve`, `make test`, `make setup`. Every target is quick when nothing changed.
# ARGS is passed on: make serve ARGS="--port 8123", make test ARGS="tests/pure -k pages", make soak ARGS="--minutes 60".

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# What is done: a file each, within the environment, so that they go when it is deleted.
STAMPS := $(VENV)/stamps
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq
NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc -type f 2>/dev/null)
ARGS   ?=

# Packages are installed without byte code, which is made when a module is first used: most of it never is.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup serve test check soak gpu-check bench clean

help:
	@echo "make serve      set up, then serve the bundled model on 127.0.0.1:8000 (flags: ARGS=\"--port 8123\")"
	@echo "make setup      the virtual environment in $(VENV), with the quire command in it"
	@echo "make test       set up and run all tests (some: ARGS=\"tests/pure\")"
	@echo "make check      lint, format, types, architecture"
	@echo "make soak       simulation, overload, fuzzing, faults, dropped connections (ARGS=\"--minutes 10\" or \"--only storms\")"
	@echo "make gpu-check  parity tests and a first benchmark on a machine with a GPU; installs nothing"
	@echo "make bench      quire beside vLLM, llama.cpp and the limits of this machine (ARGS=\"--quick\"; bench/peers.md)"
	@echo "make clean      remove everything that these targets made"

# The packages and the native library do not need each other, so both are made at once.
MAKEFLAGS += --jobs=2
setup: $(STAMPS)/packages $(STAMPS)/quire

$(STAMPS)/venv:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Name one: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "quire needs Python 3.11 or newer; this is %d.%d. Name another: make setup PYTHON=/path/to/python3.12" % sys.version_info[:2])'
	@command -v $(CXX) c++ clang++ >/dev/null || { echo "quire needs a C++ compiler, and there is no $(CXX). Install one (apt install g++), or name it with CXX=" >&2; exit 1; }
	@echo "Setting up, once; it takes some minutes. Making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

$(STAMPS)/packages: pyproject.toml constraints.txt | $(STAMPS)/venv
	@echo "Installing packages"
	@$(BIN)/python tools/requirements.py > $@.txt
	@$(PIP) install --no-compile -c constraints.txt -r $@.txt
	@touch $@

# An editable install lists each module with its file, so it is made again when packages have come.
$(STAMPS)/quire: $(NATIVE) $(wildcard src/quire/*/__init__.py src/quire/*/*/__init__.py) | $(STAMPS)/venv
	@echo "Building the native library"
	@$(PIP) install --no-deps --editable .
	@touch $@

$(STAMPS)/dev: $(STAMPS)/packages
	@echo "Installing what the tests need"
	@$(BIN)/python tools/requirements.py dev > $@.txt
	@$(PIP) install --no-compile -c constraints.txt -r $@.txt
	@touch $@

# The page's tests look at it with Chromium; without one they are skipped, and say so.
$(STAMPS)/browser: $(STAMPS)/dev
	@echo "Looking for a browser for the page's tests"
	@sh tools/browser.sh $(BIN)/playwright || echo "No Chromium: the page's tests will be skipped"
	@touch $@

serve: setup
	@exec $(BIN)/quire serve $(ARGS)

test: setup $(STAMPS)/dev $(STAMPS)/browser
	$(BIN)/python -m pytest $(ARGS)

check: setup $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy bench/*.py
	MYPYPATH=src:. $(BIN)/mypy --explicit-package-bases bench/cpu
	$(BIN)/python -m pytest tests/pure/test_architecture.py

soak: setup $(STAMPS)/dev
	$(BIN)/python tests/soak.py $(ARGS)

gpu-check:
	PYTHONPATH=src $(PYTHON) tools/gpu_check.py $(ARGS)

bench: setup
	$(BIN)/python bench/cpu/compare.py $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src -name '*.so' -delete
	find src tests tools bench -name __pycache__ -prune -exec rm -rf {} +
