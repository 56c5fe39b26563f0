# Everything a newcomer needs: make demo, make test. Only Python >= 3.12 is asked for.
SHELL := /bin/bash
VENV := .venv
BONY := $(VENV)/bin/bony
READY := $(VENV)/ready
DEMO ?= demo

.PHONY: help demo test test-fast lint setup clean

help:
	@echo "make demo       slides to an evaluated encoder on made slides, in minutes; then open $(DEMO)/report.html"
	@echo "make test       all tests, those of minutes too"
	@echo "make test-fast  without those of minutes"
	@echo "make lint       ruff and mypy"
	@echo "make setup      only .venv with everything installed"

setup: $(READY)

# .ci/find-python looks for an interpreter and says where it looked when there is none.
$(READY): pyproject.toml constraints.txt
	@python="$$(bash .ci/find-python)" || exit 1; \
	echo "using $$python"; \
	test -x $(VENV)/bin/python || "$$python" -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	@touch $@

demo: $(READY)
	rm -rf $(DEMO)
	$(BONY) demo --out $(DEMO)

test: $(READY)
	$(VENV)/bin/python -m pytest

test-fast: $(READY)
	$(VENV)/bin/python -m pytest -m "not slow"

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
