# make demo           the main job on what the package ships, on two CPU ranks
# make demo-real      the same on a real base of 135 M parameters, which it makes first
# make test           the tests
# make test-versions  unit and numerics tests with the oldest and the newest libraries of setup.py
# make test-wheel     the main job from a wheel that is installed outside the clone
# make test-cluster   a real Slurm and several hosts on this machine; needs root and Debian
# make check          formatting, lint and types
# make docs           the site of docs/ in build/site/html; warnings are errors; Python 3.11 or later
# make audit          licences and known vulnerabilities of the locked set; needs the internet
# make async-io       DeepSpeed's extension for offload to NVMe, without which its tests skip
# make constraints    the lock of the tested set, with the newest of everything
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
REAL_BASE := runs/real-base/smollm2-135m
REAL_RUN := runs/demo-real
# Two ranks on two cores: more threads than cores make each of them slower.
DEMO_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false SPT_CACHE=runs/cache

# DeepSpeed and PyTorch call ninja by its name when they build.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo demo-real docs test test-versions test-wheel audit async-io test-slow test-cluster check constraints clean
.DEFAULT_GOAL := demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python setup.py constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# Their lock is one of its own: nothing else needs them.
$(VENV)/.installed-docs: $(VENV)/.installed docs/site/constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -c docs/site/constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.installed-docs
	$(BIN)/python docs/site/stage.py build/site/source
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env \
	    -c docs/site build/site/source build/site/html

# Needs nothing that is installed: it has to work while the old lock cannot be.
constraints: $(BIN)/python
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile setup.py --constraints constraints.in --universal --python-version 3.10 \
	    --extra dev --upgrade --no-annotate --no-emit-index-url --quiet --output-file constraints.txt
	printf '%s\n' sphinx myst-parser furo | $(BIN)/uv pip compile - --constraints constraints.txt \
	    --universal --python-version 3.11 --no-annotate --no-header --no-emit-index-url --quiet \
	    | grep -vxFf constraints.txt > docs/site/constraints.txt

# $(call main_job,RUN,OPTIONS): two ranks under ZeRO-3 train and reply; then scores and a table.
define main_job
	rm -rf $(1)
	$(DEMO_ENV) $(BIN)/deepspeed --num_gpus 2 --module spt_ds.train $(2) \
	    --deepspeed_config ds_configs/zero3.json --run-dir $(1)
	$(DEMO_ENV) $(BIN)/deepspeed --num_gpus 2 --module spt_ds.generate $(1)
	$(DEMO_ENV) $(BIN)/deepspeed --num_gpus 2 --module spt_ds.generate $(1) --base-alone
	$(BIN)/spt-ds evaluate $(1)/generate/predictions.jsonl --out $(1)/generate
	$(BIN)/spt-ds summary $(1)
endef

demo: $(VENV)/.installed
	$(call main_job,$(RUN),--config clients)

demo-real: $(VENV)/.installed
	$(BIN)/python benchmarks/real_base.py $(REAL_BASE)
	$(call main_job,$(REAL_RUN),--config smollm2-135m --set model.base=$(REAL_BASE))

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not cluster"

test-versions: $(VENV)/.installed-dev
	$(BIN)/python -m tests.versions

test-wheel: $(VENV)/.installed-dev
	$(BIN)/python -m tests.wheel

# In an environment of its own: what it installs is no part of the tested set.
audit: $(VENV)/.installed-dev
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit pip-licenses
	.venv-audit/bin/pip-licenses --python $(BIN)/python --format=markdown --order=license
	.venv-audit/bin/pip-audit --no-deps --disable-pip --requirement constraints.txt \
	    --requirement docs/site/constraints.txt

# Takes minutes, once: DeepSpeed keeps the build in TORCH_EXTENSIONS_DIR.
async-io: $(VENV)/.installed-dev
	$(BIN)/python -c "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow"

test-cluster: $(VENV)/.installed-dev
	$(BIN)/python -m tests.cluster

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(RUN) $(REAL_RUN) runs/cache build *.egg-info
