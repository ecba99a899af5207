# make demo   the main job on what the package ships, on two CPU ranks
# make test   the tests
# make check  formatting, lint and types
# make test-cluster   a real Slurm and several hosts on this machine; needs root and Debian, says so where it cannot
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
# Two ranks on two cores: more threads than cores make each of them slower.
DEMO_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false SPT_CACHE=runs/cache

.PHONY: demo test test-slow test-cluster check clean
.DEFAULT_GOAL := demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python setup.py
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	rm -rf $(RUN)
	$(DEMO_ENV) $(BIN)/deepspeed --num_gpus 2 --module spt_ds.train --config demo \
	    --deepspeed_config ds_configs/zero3.json --run-dir $(RUN)
	$(DEMO_ENV) $(BIN)/deepspeed --num_gpus 2 --module spt_ds.generate $(RUN)
	$(DEMO_ENV) $(BIN)/deepspeed --num_gpus 2 --module spt_ds.generate $(RUN) --base-alone
	$(BIN)/spt-ds evaluate $(RUN)/generate/predictions.jsonl --out $(RUN)/generate
	$(BIN)/spt-ds summary $(RUN)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow and not gpu and not cluster"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow"

test-cluster: $(VENV)/.installed-dev
	$(BIN)/python -m tests.cluster

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(RUN) runs/cache build *.egg-info
