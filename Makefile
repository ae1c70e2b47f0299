# `make demo` and `make test` set up .venv by themselves, then do their job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check-slow lint gpu-check fuzz clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# setuptools warns at length of editable installs.
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

demo: $(READY)
	$(BIN)/python -m lavin_rt.demo --output demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest -m "not slow"

check-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# With the torch at hand (PYTHON=...) and nothing installed: a machine with a GPU may have no package index.
# DIR is the folder for the JSON files; FULL=1 adds the whole matrix of sizes and pairs.
gpu-check:
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/export:$(CURDIR)/benchmarks $(PYTHON) -m lavin_bench.gpu_check --output $(or $(DIR),gpu-check) $(if $(FULL),--full)

# Hostile bytes for every reader of files, Python's and the native runner's, SECONDS each; build/fuzz keeps what it finds.
fuzz: $(READY)
	$(BIN)/python tests/fuzz/run.py --seconds $(or $(SECONDS),600)

clean:
	rm -rf $(VENV) demo build dist *.egg-info
