# make demo | demo-video | test | lint | types | docs | generate | clean
#
# TORCH= (empty) keeps the torch of the surrounding Python, for machines with CUDA:  make demo TORCH=
# TORCH='torch==2.11.0' asks for another release. PYTHON picks the interpreter, VENV the folder.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
TRITON ?= $(shell grep '^triton==' constraints.txt)
JOBS   ?= 2
MODEL  ?= examples/models/tiny-llama
OUT    ?= runs/tiny-llama
# A GPU is through with 8k of so small a model before its host has started all of it.
LENGTH ?= $(if $(shell nvidia-smi -L 2>/dev/null),32k,8k)
VIDEO  ?= runs/tiny-wan

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NEEDS := pyproject.toml constraints.txt

export TOKENIZERS_PARALLELISM = false
# Many processes import the same: what one has compiled is there for the others.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo demo-video test lint types pytest docs generate clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,4s/^# *//p' Makefile

# torch comes first and stays: everything after it is resolved around the build that is there.
$(VENV)/constraints.txt: $(NEEDS)
	$(PYTHON) -m venv $(if $(TORCH),,--system-site-packages) $(VENV)
	$(if $(TORCH),$(PIP) '$(TORCH)')
	grep -vE '^(torch|triton)==' constraints.txt > $@
	$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" >> $@

$(VENV)/.demo: $(VENV)/constraints.txt
	$(PIP) -c $< -e '.[llm,report]'
	@touch $@

$(VENV)/.demo-video: $(VENV)/constraints.txt
	$(PIP) -c $< -e '.[diffusion,report]'
	@touch $@

# Triton belongs to the CUDA builds of torch; beside a CPU build it is needed for its interpreter.
$(VENV)/.test: $(VENV)/constraints.txt
	$(PIP) -c $< -e '.[llm,diffusion,report,dev]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) "$(TRITON); sys_platform == 'linux'"
	@touch $@

$(VENV)/.docs: $(VENV)/.test
	$(PIP) -c $(VENV)/constraints.txt -e '.[docs]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/accelkit calibrate $(MODEL) --out $(OUT) --budget 2% --lengths $(LENGTH) --yes
	$(BIN)/accelkit patch $(MODEL) --plan $(OUT) --demo

# A size that the model was trained on and a step cache alone, so that two CPU cores need minutes.
demo-video: $(VENV)/.demo-video
	$(BIN)/python examples/video.py --height 48 --width 48 --frames 17 --steps 20 \
		--budget 0.15 --preset fast --methods mag_cache --out $(VIDEO)

# Tests import a part of what is installed; the rest need not be compiled.
test: PIP += --no-compile
test: lint types pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(VENV)/.test
	$(BIN)/mypy

# One thread a worker: two workers on two cores.
pytest: $(VENV)/.test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -q -n $(JOBS) --dist worksteal -m 'not network'

# The plan's schema and the generated parts of README; the pages of the site are made on the way.
generate: $(VENV)/.test
	$(BIN)/python docs/generate.py

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site runs .pytest_cache .mypy_cache .ruff_cache
