# make demo       set everything up (once) and run the whole of NeuroGaze-Distill on made-up data
# make test       set everything up (once) and run the tests, JOBS at a time
# make test-slow  the tests that are marked slow: long forms, which CI runs too
# make lint       ruff, docstrings included, and mypy
# make gpu-check  on a GPU machine: build there, run every GPU test and the benches, print a table
# make clean      remove what was built; the next make builds it again
#
# PYTHON  interpreter the virtual environment is made from
# VENV    the environment; name an existing one (VENV=/path) to use it, for example one that holds a CUDA PyTorch
# JOBS    test processes side by side; files of tests stay whole
# TORCH   what pip installs as PyTorch where the environment has none

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= outs/demo
JOBS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))

BIN := $(VENV)/bin
BUILD_FILES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test test-slow lint gpu-check clean

demo: $(VENV)/.ngd_fast-demo
	$(BIN)/ngd-fast demo --out $(OUT)

test: $(VENV)/.ngd_fast-test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

test-slow: $(VENV)/.ngd_fast-test
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/.ngd_fast-test
	$(BIN)/ruff check .
	$(BIN)/mypy

gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bench/gpu_check.py $(ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { echo "error: '$(PYTHON) -m venv' failed; on Debian: apt-get install python3-venv python3-dev g++"; exit 1; }

# torch comes first: everything that builds against it, or would pull another build of it, comes after. Nothing that an
# environment has is upgraded: PyTorch 2.11, say, wants setuptools below 82.
$(VENV)/.ngd_fast-torch: | $(BIN)/python
	$(BIN)/python -m pip install -q "setuptools>=64" wheel "pybind11>=2.12" ninja
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	touch $@

$(VENV)/.ngd_fast-demo: $(VENV)/.ngd_fast-torch $(BUILD_FILES)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[eeg,viz]"
	touch $@

# DALI for CUDA 13 also holds the CPU operators that the tests run.
$(VENV)/.ngd_fast-test: $(VENV)/.ngd_fast-demo
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[eeg,bids,viz,export,detect,video,dali-cuda13,triton,dev]"
	touch $@

clean:
	rm -rf build dist *.egg-info ngd_fast/*.so ngd_fast/_build_info.py $(VENV)/.ngd_fast-demo $(VENV)/.ngd_fast-test
