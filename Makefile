# `make` lists what there is. One setting that matters is TORCH, see `make help`.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.manray-ready
TORCH ?= $(shell grep -m1 '^torch==' constraints.txt)
ARGS ?=
# Two processes with a Ray each, a file of tests to either; in the order of the names, so that no
# long file is the last one.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
PEERS := DALL-E==0.1 dalle-pytorch==1.6.6 einops==0.8.2 rotary-embedding-torch==0.9.1 \
	axial-positional-embedding==0.3.12 transformers==5.24.0 huggingface-hub regex

.PHONY: help setup peers quickstart check test chaos bench clean

help: ## this list
	@echo "manray: a list of pictures on the web to a served text-to-image model, on Ray"
	@echo
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo
	@echo "  ARGS=\"…\"     is appended to the command: make quickstart ARGS=\"--output runs/mine\""
	@echo "  PYTHON=…     the Python 3.11 or 3.12 to build $(VENV) with (default: the first found)"
	@echo "  TORCH=\"…\"    what pip installs for torch (default: $(TORCH)). On Linux that may be the"
	@echo "               CUDA build, gigabytes larger; for another build, name its index:"
	@echo "               make setup TORCH=\"$(TORCH) --index-url URL_OF_THE_CPU_INDEX\""

setup: $(READY) ## make .venv (again, if pyproject.toml or constraints.txt changed)

# Without what they ask for: DALL-E 0.1 wants a torchvision, for which pip would change torch.
peers: $(READY) ## the packages that tests and benchmarks compare with, for those who have none
	$(BIN)/python -m pip install --no-deps -c constraints.txt $(PEERS)

quickstart: $(READY) ## the whole way at a small size: about 10 minutes on 2 cores
	$(BIN)/python -m jobs.quickstart tiny $(ARGS)

check: $(READY) ## format, lint, types, who imports whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(READY) ## unit and integration tests, two files of them at a time
	$(BIN)/pytest tests/unit tests/integration $(TWO) -m "not chaos and not gpu" $(ARGS)

chaos: $(READY) ## kill jobs, workers, nodes and S3 between any two steps: 240 schedules, an hour or so
	$(BIN)/pytest tests/unit tests/integration -m chaos $(ARGS)

bench: $(READY) ## side by side with peers, into runs/bench/TOPIC.json
	$(BIN)/python -m tests.benchmarks.run $(ARGS)

clean: ## delete caches; never runs/, never .venv
	rm -rf .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis build *.egg-info
	find models pipelines jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: resolved together with the rest, pip tries many builds of it. Then one
# command for everything else, so that nothing is resolved without knowing of the others.
$(READY): pyproject.toml constraints.txt
	@set -euo pipefail; \
	if [ ! -x $(BIN)/python ]; then \
	  for python in $(or $(PYTHON),python3.11 python3.12 python3); do \
	    if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	      2>/dev/null; then found="$$python"; break; fi; \
	  done; \
	  if [ -z "$${found:-}" ]; then \
	    echo "manray needs Python 3.11 or 3.12 (img2dataset breaks on 3.13), and $(or $(PYTHON),none) is not it:" >&2; \
	    echo "install one, or name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.12" >&2; \
	    exit 2; \
	  fi; \
	  echo "making $(VENV) with $$("$$found" --version)"; \
	  "$$found" -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "could not make $(VENV): on Debian, apt install python3-venv" >&2; exit 2; }; \
	fi
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[report,test,dev]'
	@touch $@
