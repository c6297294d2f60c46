# Every target makes .venv in this checkout once and reuses it; it is rebuilt when a requirement changes.
# `make test PYTHON=python3.12` picks another interpreter (after `make clean`).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ladon-installed
# The oldest transformers that is supported, and the packages that it holds back.
OLDEST := .venv-oldest
OLDEST_TRANSFORMERS := 5.0.0
HELD_BACK := ^(transformers|tokenizers|huggingface_hub|httpx2|httpcore2|truststore)==

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-oldest lint bench docs clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV), once: PyTorch, transformers and the tools are downloaded (1 to 3 GB) and installed."
	@echo "This takes 2 to 10 minutes, most of them without a word."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@echo "$(VENV) is ready."
	@touch $@

demo: $(STAMP)  ## set up and run the bundled model in every mode, in three minutes
	$(BIN)/ladon demo

test: $(STAMP)  ## set up and run the fast tests
	$(BIN)/python -m pytest -n auto

test-slow: $(STAMP)  ## the slow tests alone: every model family, the recipe end to end
	$(BIN)/python -m pytest -n auto -m slow

test-oldest: $(OLDEST)/.ladon-installed  ## the fast tests with the oldest supported transformers
	$(OLDEST)/bin/python -m pytest -n auto

$(OLDEST)/.ladon-installed: pyproject.toml constraints.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	grep -vE '$(HELD_BACK)' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt -e '.[dev]' \
		transformers==$(OLDEST_TRANSFORMERS)
	@touch $@

lint: $(STAMP)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## plain, chain, fixed and dynamic side by side on the bundled model
	OMP_NUM_THREADS=1 $(BIN)/ladon bench

docs: $(STAMP)  ## refresh the pages made from the program, then build the site
	$(BIN)/python docs/refresh.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the site is built: open site/index.html"

clean:  ## remove .venv and every cache
	rm -rf $(VENV) $(OLDEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
