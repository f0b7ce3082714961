# make demo    set up, fetch the models, index the shipped corpus and answer six questions (again: reuses the caches)
# make test    set up and run every check: ruff, mypy, pytest
# Needs Python 3.11 or newer with venv, and a package registry; everything is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install model demo test lint types unit format clean

help:
	@sed -n 's/^# make/make/p' Makefile

install: $(INSTALLED)

# torch first and by itself: then pip takes the build that lies nearest, and the rest cannot pull another one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || (echo "error: needs Python's venv module (Debian: apt-get install python3-venv)"; exit 1)
	$(BIN)/python -m pip install --quiet -c constraints.txt --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt --editable '.[all]' --group dev
	touch $(INSTALLED)

model: $(INSTALLED)
	$(BIN)/python -P -m prophetkv_rag.defaults

demo: model
	$(BIN)/prophetkv-rag demo

test: lint types unit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# On a throw-away copy: mypy does not see the two mapped folders through the editable install.
types: $(INSTALLED)
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p prophetkv_rag
	rm -rf build

unit: model
	$(BIN)/pytest

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
