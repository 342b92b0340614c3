# Everything runs in .venv, which the first target that needs it makes. ARGS="..." goes to the command of a target.

PYTHON ?= python3
ARGS ?=
PIP = -m pip install --quiet --disable-pip-version-check
CORE_TESTS = tests/test_layouts.py tests/test_adapters.py tests/test_vectorizers.py tests/test_failures.py

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: .venv/.ready  ## make .venv with the pinned requirements (about 2 minutes)

train: .venv/.ready  ## train on Breakout, two or three minutes on 2 cores; ARGS="--env-id PongNoFrameskip-v4 --seed 2" passes flags
	.venv/bin/python -u puffer_ppo_atari.py --total-timesteps 24576 $(ARGS)
	@echo "Curves of this and all other runs: .venv/bin/tensorboard --logdir runs"

test: .venv/.ready  ## run all tests, two at a time, 7 to 12 minutes; ARGS="-k ladder" passes flags
	.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: .venv/.ready  ## check style and spelling
	.venv/bin/ruff check .
	.venv/bin/codespell

bench: .venv/.ready  ## measure speed, about 35 minutes with nothing else running, and draw; ARGS="--quick" for a first look
	-.venv/bin/python $(PIP) --no-deps pufferlib-core==3.0.23  # a rival whose own pins do not go with ours
	.venv/bin/python -m benchmarks.vectorization $(ARGS)
	.venv/bin/python -m benchmarks.emulation $(ARGS)
	.venv/bin/python -m benchmarks.training $(ARGS)
	.venv/bin/python -m benchmarks.report

bench-learn: .venv/.ready  ## measure how soon demo.py learns, about 20 minutes with nothing else running, and draw
	.venv/bin/python -m benchmarks.learning $(ARGS)
	.venv/bin/python -m benchmarks.report

charts: .venv/.ready  ## draw the charts and tables of BENCHMARKS.md and README.md anew from benchmarks/results
	.venv/bin/python -m benchmarks.report

test-matrix: .venvs/gymnasium-1.4.0/.ready .venvs/numpy-1.26.4/.ready  ## the core's tests under newer and older packages
	@failed=; for venv in $(^D); do \
		echo "== $$venv"; $$venv/bin/python -m pytest $(CORE_TESTS) $(ARGS) || failed="$$failed $$venv"; \
	done; test -z "$$failed" || { echo "failed under:$$failed"; exit 1; }

# The file is written last, so an installation that was cut short, or began with a wrong Python, starts anew.
.venv/.ready: requirements.txt
	@echo "Setting up .venv; this takes about 2 minutes."
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python $(PIP) -r requirements.txt
	@touch $@

# One package differs from requirements.txt, and what would hold it back stays out.
.venvs/%/.ready: requirements.txt
	$(PYTHON) -m venv --clear $(@D)
	grep -v '^$(firstword $(subst -, ,$*))=' requirements.txt > $(@D)/constraints.txt
	$(@D)/bin/python $(PIP) -c $(@D)/constraints.txt $(subst -,==,$*) \
		gymnasium numpy torch pettingzoo mpe2 pytest pytest-timeout hypothesis cloudpickle threadpoolctl
	@touch $@

.PHONY: help setup train test lint bench bench-learn charts test-matrix
.DEFAULT_GOAL := help
.SUFFIXES:
