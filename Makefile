# make demo    a real model, compressed, exported, run and judged
# make test    every fast test          make test-slow   the others
# make lint    ruff and mypy            make bench       benchmarks against peers
# Each sets up what it needs: a virtual environment in .venv, the dependencies, the native library.

PYTHON ?= python3
VENV ?= .venv
# Installed first and alone: asked for through another package, pip may bring the newest CUDA build of several GB.
TORCH ?= torch==2.13.0
export PYTHON VENV TORCH

NATIVE := CMakeLists.txt $(wildcard plugins_ort/src/*)

.PHONY: setup demo test test-slow lint bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt scripts/setup.sh $(NATIVE)
	@sh scripts/setup.sh

demo: setup
	@$(VENV)/bin/python scripts/demo.py

test: setup
	@$(VENV)/bin/python -m pytest -m "not slow"

test-slow: setup
	@$(VENV)/bin/python -m pytest -m slow

lint: setup
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

bench: setup
	@$(VENV)/bin/python scripts/bench_layer.py

clean:
	rm -rf $(VENV) build
