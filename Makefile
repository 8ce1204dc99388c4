# make test      set up .venv and run the tests
# make demo      set up .venv and train the example on this machine
# make matrix    every model on every mesh (slow)
# make docs      the documentation, into site/
# make lint      ruff and mypy        make format    apply ruff
# make clean     remove .venv and caches
#
# PYTHON   the interpreter that makes .venv (3.11 or 3.12)
# TORCH    the build of torch, as pip spells it: TORCH="torch==2.13.0+cu130"
# ARGS     passed on: make test ARGS="-k mesh -x", make demo ARGS="--mesh dp=2,pp=2"

SHELL  := /bin/bash
PYTHON ?= python3
EXTRAS := test,plots,hf,cli,docs,dev
PINNED := $(shell grep '^torch==' constraints.txt)
GPU    := $(shell command -v nvidia-smi 2>/dev/null)
BIN    := .venv/bin
STAMP  := .venv/.installed

# Without a GPU the small CPU build is wanted; an index that has none still gives one that works.
ifdef TORCH
  INSTALL_TORCH = $(BIN)/pip install "$(TORCH)"
else ifneq ($(GPU),)
  INSTALL_TORCH = $(BIN)/pip install "$(PINNED)"
else
  INSTALL_TORCH = $(BIN)/pip install -q "$(PINNED)+cpu" 2>/dev/null || $(BIN)/pip install "$(PINNED)"
endif

.PHONY: test demo matrix docs lint format clean

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

demo: $(STAMP)
	$(BIN)/python examples/train_gpt.py $(ARGS)

matrix: $(STAMP)
	$(BIN)/python -m tests.matrix $(ARGS)

docs: $(STAMP)
	$(BIN)/mkdocs build --strict $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

# torch first and alone: what follows then finds it installed, whichever build it is.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' here; say which: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { \
	  echo "error: nemo2 needs Python 3.11 or 3.12, '$(PYTHON)' is $$($(PYTHON) -V 2>&1); say which: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(INSTALL_TORCH)
	grep -v '^torch==' constraints.txt > .venv/constraints.txt
	$(BIN)/pip install -q -c .venv/constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
