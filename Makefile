# Every target creates the environment it needs; a second run finds it up to date.
#   make test VENV=path       use (and update) an environment of yours
#   make demo MODEL=path      the demo on another checkpoint
.DEFAULT_GOAL := help
.PHONY: help env demo test test-all test-oldest test-upstream check docs format bench bench-gpu study kernel-hub clean

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
# transformers' own tests are unpacked here.
UPSTREAM_CACHE ?= .cache/upstream
NUM_WORKERS ?= 2
TOKENS ?= 2000000
# More of pytest's options: make test PYTEST_ARGS="-k packaging"
PYTEST_ARGS ?=

CONSTRAINTS ?= constraints.txt
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)

PY := $(VENV)/bin/python
STAMP := $(VENV)/.depthattn-installed
# One thread per worker: the models are tiny, and more threads than cores only wait for each other.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -n $(NUM_WORKERS) --dist loadfile --no-loadscope-reorder --durations=10

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

# torch comes first and alone, so that a CPU build that is at hand is taken and stays.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "torch==$(TORCH)"
	$(PY) -m pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@

env: $(STAMP)  ## create or update the environment (VENV)

demo: $(STAMP)  ## retrofit and verify, then train twins from scratch (MODEL=path-or-id: fine-tune that checkpoint)
	$(PY) examples/$(if $(MODEL),demo_retrofit.py --model $(MODEL),demo.py)

test: $(STAMP)  ## the tests, without the slow ones
	$(PYTEST) $(PYTEST_ARGS)

test-all: $(STAMP)  ## every test of this project
	$(PYTEST) -m "slow or not slow" $(PYTEST_ARGS)

test-oldest:  ## the tests with the oldest supported transformers (constraints-oldest.txt)
	$(MAKE) test VENV=$(VENV_OLDEST) CONSTRAINTS=constraints-oldest.txt

test-upstream: $(STAMP)  ## transformers' own common tests on our classes (tests/upstream/README.md)
	home=$$($(PY) tests/upstream/get_tests.py $(UPSTREAM_CACHE) $(if $(TRANSFORMERS_CHECKOUT),--checkout \
	  $(TRANSFORMERS_CHECKOUT))) && DEPTHATTN_UPSTREAM_TESTS=$$home $(PYTEST) tests/upstream \
	  -m "slow or not slow" $(PYTEST_ARGS)

check: $(STAMP)  ## lint, format, types and commit subjects, without changing a file
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) .ci/check_types.py
	$(PY) .ci/check_commit_subjects.py

docs: $(STAMP)  ## the documentation as a site, in build/docs; every warning is an error
	$(PY) -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

format: $(STAMP)  ## fix what ruff can fix, and format; renew the generated parts of documents
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) docs/render_documents.py

bench: $(STAMP)  ## CPU overhead and bytes of the depth connections; writes benchmarks/results/
	$(PY) benchmarks/cpu_overhead.py --threads 1 --output benchmarks/results/cpu_overhead.json
	$(PY) benchmarks/training_memory.py --output benchmarks/results/training_memory.json
	$(PY) benchmarks/bytes_moved.py --output benchmarks/results/bytes_moved.json

bench-gpu: $(STAMP)  ## parity, then speed beside other kernels on a GPU; writes benchmarks/results/ (MODA_REPO=checkout)
	$(PY) benchmarks/gpu_suite.py --output benchmarks/results/gpu_suite.json $(if $(MODA_REPO),--moda-repo $(MODA_REPO))

study: $(STAMP)  ## train the models of docs/evidence.md, which takes hours and can be interrupted (TOKENS=bytes per run)
	$(PY) -m benchmarks.pretraining.grid --tokens $(TOKENS)
	$(PY) -m benchmarks.pretraining.dynamics --tokens $(TOKENS)
	$(PY) -m benchmarks.pretraining.evidence

kernel-hub: $(STAMP)  ## the kernels as a repository for the Kernel Hub, in build/kernel_hub, which must not exist
	$(PY) -m hf_depthattn.conversion.kernel_hub build/kernel_hub

clean:  ## remove build products and caches, not the environments
	rm -rf build dist *.egg-info .cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./.venv*" -prune -exec rm -rf {} +
