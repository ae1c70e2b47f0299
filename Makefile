# `make demo` and `make test` set up .venv by themselves, then do their job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Processes that share the tests, each with one thread; a file's tests stay together.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: help demo test check-slow lint format readme gpu-check fuzz clean

help: ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# setuptools warns at length of editable installs.
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

demo: $(READY) ## vision tasks with the small model, without a GPU
	$(BIN)/python -m lavin_rt.cli.demo --output demo

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## rewrite the code in the house's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint ## the quick tests
	$(PYTEST) -m "not slow"

check-slow: $(READY) ## the tests that take their time
	$(PYTEST) -m slow

readme: $(READY) ## the tables of the documents, from the records
	$(BIN)/python -m lavin_bench.report --write benchmarks/README.md
	$(BIN)/python -m lavin_bench.report --write docs/guide.md

# With the torch at hand (PYTHON=...) and nothing installed: a machine with a GPU may have no package index.
# DIR is the folder for the JSON files; FULL=1 adds the whole matrix of sizes and pairs, MINUTES=30 gives a slow GPU time.
gpu-check: ## all that needs a GPU, in ten minutes, into DIR
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/export:$(CURDIR)/benchmarks $(PYTHON) -m lavin_bench.gpu_check --output $(or $(DIR),gpu-check) $(if $(FULL),--full) $(if $(MINUTES),--minutes $(MINUTES))

# SECONDS each; build/fuzz keeps what it finds.
fuzz: $(READY) ## hostile bytes for every reader of files, Python's and the native runner's
	$(BIN)/python tests/fuzz/run.py --seconds $(or $(SECONDS),600)

clean: ## remove what was set up and made
	rm -rf $(VENV) demo build dist *.egg-info
