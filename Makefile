# make train       set up, then pre-train on the built-in scenes
# make test        set up, then the tests
# make test-runs   whole commands: the main job, resume, what the README shows
# make test-full   every documented command at full length
# make test-faults kills, damage, silent ranks: the full matrix of docs/reliability.md
# make check       style
# make docs        the site, into site/
# make bench       benchmarks at the sizes of this machine
# make gpu-step   the whole training step on such a machine, unattended
# make gpu-test, gpu-bench   on a machine with a CUDA device and its own environment: tests, then every measurement

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SECOND_TRITON := 3.6.0
export TRITON_ALT := $(CURDIR)/$(VENV)/triton-$(SECOND_TRITON)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup train test test-runs test-faults test-full check docs bench gpu-test gpu-bench gpu-step clean

train: $(VENV)/.ready
	deepspeed train/pretrain.py --config ds_zero2.json

test: $(VENV)/.ready $(VENV)/.triton
	OMP_NUM_THREADS=1 python -m pytest tests -n 2 --dist loadfile -m "not run and not full and not faults and not gpu"

test-runs: $(VENV)/.ready
	python -m pytest tests/runs -m "run and alone and not full and not gpu"
	ONE_CORE_EACH=1 OMP_NUM_THREADS=1 python -m pytest tests -n 2 --dist loadfile \
	  -m "run and not alone and not full and not gpu"

test-faults: $(VENV)/.ready
	python -m pytest tests/runs/test_faults.py tests/runs/test_faults_tuning.py tests/runs/test_disks.py \
	  tests/runs/test_signals.py tests/runs/test_kills.py tests/runs/test_options.py tests/runs/test_two_hosts.py \
	  tests/runs/test_target.py tests/train/test_durable.py

test-full: $(VENV)/.ready $(VENV)/.triton
	$(PIP) install --no-deps -c constraints.txt pycocoevalcap
	python -m pytest tests -m "run or full"

check: $(VENV)/.ready
	ruff check .
	ruff format --check .

docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

bench: $(VENV)/.ready
	python -m pytest bench/ --benchmark-only

gpu-test:
	$(PYTHON) -m pytest tests -m gpu

gpu-bench:
	$(PYTHON) -m bench.gpu

gpu-step:
	$(PYTHON) -m bench.gpu --only step

setup: $(VENV)/.ready $(VENV)/.triton

# The project's dependencies at their tested versions, but not the project: its commands run from the checkout.
$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e ".[dev]"
	$(PIP) uninstall -y sycoca
	$(PIP) install --no-deps -c constraints.txt open_clip_torch ftfy regex wcwidth transformers
	touch $@

$(VENV)/.triton: $(VENV)/.ready
	$(PIP) install --no-deps --target $(TRITON_ALT) triton==$(SECOND_TRITON)
	touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .benchmarks
