# `make demo` and `make test` do all the set-up they need: a virtual environment in .venv, torch pinned by
# constraints.txt, and the C++ extension built against that torch.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: demo test bench lint clean

demo: $(INSTALLED)
	$(BIN)/loku demo --output_dir runs/demo --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

bench: $(INSTALLED)
	$(BIN)/python -m pytest bench

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Without --no-build-isolation pip would fetch a second torch, with gigabytes of CUDA, only to build. Without --no-deps
# BackPACK would bring a torchvision for CUDA, which does not load beside a CPU build of torch and breaks transformers.
$(INSTALLED): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel ninja numpy torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[bench,lint]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps backpack-for-pytorch unfoldNd
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info loku_kernels/*.so
