# `make demo` and `make test` start from a fresh clone: all they need is make and Python >= 3.11.
# Another interpreter: `make distclean`, then `PYTHON=python3.12 make test`.

PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -c constraints.txt
# Installed first and by exact version: left to pip, a bare `torch` is the newest CUDA build.
TORCH := $(shell grep '^torch==' constraints.txt)
# Written last, so that an install that broke off is taken up again; they vanish with the environment.
CORE := .venv/.installed-core
DEV := .venv/.installed-dev

.PHONY: help demo test lint format clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make demo       compress the bundled model, offline, in about a minute"
	@echo "make test       lint, type check, import check, tests"
	@echo "make lint       the checks alone"
	@echo "make format     mend what ruff can mend"
	@echo "make clean      remove caches and builds"
	@echo "make distclean  remove .venv as well"

# Threads that wait let go of their core: on a machine that others use too, spinning takes many times as long.
demo: $(CORE)
	OMP_WAIT_POLICY=passive $(BIN)/eckart demo

# Each worker keeps to one thread: on few cores more would only fight.
test: lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# ensurepip writes pip last: an environment without it was never finished.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit("eckart needs Python >= 3.11, and $(PYTHON) is " + sys.version.split()[0] + ": try PYTHON=python3.12 make ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

$(CORE): pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) $(TORCH)
	$(PIP) -e .
	@touch $@

$(DEV): $(CORE)
	$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
