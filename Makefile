# make demo    a real model, compressed, exported, run and judged
# make test    every fast test          make test-slow   the others
# make lint    ruff and mypy            make bench       benchmarks against peers
# make plugin  the TensorRT plugin
# Each sets up what it needs: a virtual environment in .venv, the dependencies, the native library.

PYTHON ?= python3
VENV ?= .venv
# Installed first and alone: asked for through another package, pip may bring the newest CUDA build of several GB.
TORCH ?= torch==2.13.0
export PYTHON VENV TORCH

NATIVE := CMakeLists.txt $(wildcard plugins_ort/src/*)
PLUGIN := plugins_trt/CMakeLists.txt $(wildcard plugins_trt/src/*)

.PHONY: setup plugin demo test test-slow lint bench clean

# What only TensorRT needs may fail: engines for CPUs are built without it, and sslc-doctor says what is missing.
setup: $(VENV)/.ready
	@$(MAKE) --no-print-directory plugin || echo "setup: without the TensorRT plugin, engine.plan cannot be built here"

plugin: $(VENV)/.plugin

$(VENV)/.plugin: $(VENV)/.ready scripts/plugin.sh $(PLUGIN)
	@sh scripts/plugin.sh
	@touch $@

$(VENV)/.ready: pyproject.toml constraints.txt scripts/setup.sh $(NATIVE)
	@sh scripts/setup.sh

# What only the tests need. It brings a dozen packages with it.
$(VENV)/.harness: $(VENV)/.ready
	@echo "setup: lm-evaluation-harness, for the tests"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt lm_eval
	@touch $@

demo: setup
	@$(VENV)/bin/python scripts/demo.py

# A process per core, about 1 GiB each, with one thread, so that they do not wait for each other. A file's tests stay
# together, as they share what is costly.
test: setup $(VENV)/.harness
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 8 --dist loadfile

test-slow: setup $(VENV)/.harness
	@$(VENV)/bin/python -m pytest -m slow

lint: setup
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

bench: setup
	@mkdir -p build
	@$(VENV)/bin/python scripts/bench_cpu.py --quick --json build/bench.json

clean:
	rm -rf $(VENV) build
