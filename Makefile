# Every target does its own set-up: a virtual environment in .venv, this package with its tools in it, and, where it is
# needed, llama.cpp (found, or built once into the user's cache). Needed beforehand: Python 3.11 or later, a C/C++
# compiler, and access to a Python package index.

VENV := .venv
PYTHON := $(VENV)/bin/python
NODE := $(VENV)/bin/libmesh-node
INSTALLED := $(VENV)/.installed
PYTEST_FLAGS ?=
FUZZ_SECONDS ?= 60

.DEFAULT_GOAL := help
.PHONY: help install engine demo lab test test-slow lint format proto check-proto bench fuzz clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

install: $(INSTALLED) ## make .venv and install everything into it

$(INSTALLED): pyproject.toml tools/make_venv.sh tools/need_gmp.sh
	@sh tools/make_venv.sh $(VENV)
	@sh tools/need_gmp.sh $(VENV)
	@echo "Installing libmesh and its tools into $(VENV) (some minutes the first time) ..."
	@$(PYTHON) -m pip install --disable-pip-version-check -qq --editable '.[dev]'
	@# trio-typing, which py-libp2p pulls in, brings stubs of a trio of 2021 that hide trio's own types from mypy.
	@rm -rf $(VENV)/lib/python3*/site-packages/trio-stubs
	@touch $@

engine: $(INSTALLED) ## find llama.cpp's programs, or build them (about 7 minutes on two cores, once)
	@$(NODE) engine status > /dev/null 2>&1 || $(NODE) engine install

demo: $(INSTALLED) ## two real nodes on this machine, and an answer through the mesh; Ctrl-C ends them
	@$(NODE) demo

lab: $(INSTALLED) ## real nodes behind real routers on this machine, to play with (root); Ctrl-C ends them
	@$(PYTHON) -m tests.netlab

test: $(INSTALLED) engine ## the tests, those with the real llama.cpp included
	@$(PYTHON) -m pytest -m "not slow" $(PYTEST_FLAGS)

test-slow: $(INSTALLED) engine ## the tests that take their time
	@$(PYTHON) -m pytest -m slow $(PYTEST_FLAGS)

lint: $(INSTALLED) check-proto ## style, types, and whether the generated code is up to date
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

format: $(INSTALLED) ## put the code into the house's format
	@$(PYTHON) -m ruff check --fix --quiet . || true
	@$(PYTHON) -m ruff format .

proto: $(INSTALLED) ## generate the protobuf code from proto/
	@$(PYTHON) tools/generate_protobuf.py

check-proto: $(INSTALLED) ## fail if the generated protobuf code is stale
	@$(PYTHON) tools/generate_protobuf.py --check

bench: $(INSTALLED) engine ## measure, each against a peer program in the same run
	@set -e; for file in bench/*.py; do echo "$$file"; $(PYTHON) "$$file"; done

fuzz: $(INSTALLED) ## give every decoder and machine random bytes, guided by coverage; FUZZ_SECONDS=60 for each
	@$(PYTHON) -m pip install --disable-pip-version-check -qq --editable '.[fuzz]'
	@set -e; for target in $$($(PYTHON) tests/fuzz/run.py --list | cut -d' ' -f1); do \
		echo "$$target"; $(PYTHON) tests/fuzz/run.py "$$target" --seconds $(FUZZ_SECONDS); done

clean: ## remove .venv and what tools left; the cache with llama.cpp stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
