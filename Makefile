# Each of these is one command on a fresh machine with Python (venv) and make.
#   make setup   .venv with everything pinned, once   SYSTEM_TORCH=1   with the system's own torch
#   make run     an image source, the flow node, a consumer and a preview, over real DDS
#   make test    all the tests          TESTS=test/run   one part of them
#   make lint    style and types        make types       types alone
#   make bench   tables and plots of this machine: bench/results   QUICK=1  MINUTES=20  DATA=DIR
#   make bench-all   that, and every other script of bench/: hours
#   make gpu-check   all that waits for a GPU   MINUTES=9
#   make test-3.10   the tests that need no torch, on Python 3.10
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODE := $(if $(and $(ROS_DISTRO),$(AMENT_PREFIX_PATH)),$(ROS_DISTRO),pip)
STAMP := $(VENV)/.setup-$(MODE)$(if $(SYSTEM_TORCH),-system)

# make run: what is not given is left to `flow_ros run`, which explains them all (--help).
RUN_OPTIONS = \
	$(if $(SOURCE),--source '$(SOURCE)') $(if $(DURATION),--duration '$(DURATION)') \
	$(if $(FPS),--fps '$(FPS)') $(if $(SIZE),--size '$(SIZE)') $(if $(TOPIC),--topic '$(TOPIC)') \
	$(if $(NETWORK),--network '$(NETWORK)') $(if $(WEIGHTS),--weights '$(WEIGHTS)') \
	$(if $(RUNTIME),--runtime '$(RUNTIME)') $(if $(ITERATIONS),--iterations '$(ITERATIONS)') \
	$(if $(BUDGET),--budget '$(BUDGET)') $(if $(LATENCY_MS),--latency-ms '$(LATENCY_MS)') \
	$(if $(SCALE),--scale '$(SCALE)') $(if $(ROI),--roi '$(ROI)') \
	$(if $(DIRECTION),--direction '$(DIRECTION)') $(if $(PARAMS),--params-file '$(PARAMS)') \
	$(if $(OUT),--out '$(OUT)')

# make bench: `flow_ros bench --help` explains them, and single runs.
BENCH_OPTIONS = \
	$(if $(QUICK),--quick) $(if $(MINUTES),--minutes '$(MINUTES)') \
	$(if $(DATA),--data '$(DATA)') $(if $(THREADS),--threads '$(THREADS)') \
	$(if $(OUT),--out '$(OUT)')

TESTS ?= test

.PHONY: help setup run test test-3.10 lint types bench bench-all gpu-check clean

help:
	@sed -n 's/^#   make/make/p' Makefile

setup: $(STAMP)

$(STAMP): $(wildcard requirements*.txt) constraints.txt setup.py .ci/setup
	PYTHON='$(PYTHON)' SYSTEM_TORCH='$(SYSTEM_TORCH)' .ci/setup
	@touch $@

run: setup
	@$(BIN)/python -m flow_ros.cli.main run $(RUN_OPTIONS)

test: setup
	$(BIN)/python -m pytest $(TESTS)

# Skips itself, and says so, where there is no Python 3.10.
test-3.10:
	.ci/python310

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m flow_ros.cli.main bench $(BENCH_OPTIONS)

# What fails does not keep the others from being run.
bench-all: setup
	@failed=; $(MAKE) bench || failed=' make bench'; for file in $(sort $(wildcard bench/*.py)); do \
		echo "$$file"; $(BIN)/python "$$file" || failed="$$failed $$file"; done; \
		[ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

# Without `setup`: a machine that is lent for minutes may have torch and no network.
gpu-check:
	@mkdir -p out
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bench/gpu_check.py \
		$(if $(MINUTES),--minutes '$(MINUTES)') --json out/gpu_check.json \
		--markdown out/gpu_check.md

clean:
	rm -rf build install log out .mypy_cache .pytest_cache .ruff_cache
