# `make bench` and `make test` go from a fresh clone to the result.
#
#   PYTHON   interpreter that the virtual environment is made with, 3.11 or newer
#   VENV     where the virtual environment is
#   ARGS     passed on: make bench ARGS="--preset smoke", make test ARGS="-k topk"
#   NAME     what a baseline is called, after the device: make baseline NAME=nvidia-h200
#   WORKERS  processes that compile kernels, and that run tests in Triton's interpreter

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2

SUITES := $(filter-out conftest peers quality,$(patsubst suites/%.py,%,$(wildcard suites/[!_]*.py)))

# What one process compiles, of tests with their assertions, the next one reads.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# In one thread: two that wait for each other would show how busy the machine is.
CHECK = OMP_NUM_THREADS=1 $(BIN)/python bench.py --suite coor_descent --suite topk --preset smoke --device cpu --compile-for 90

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install bench baseline check baseline-cpu test test-gates test-alone test-plain test-plans test-interpreted test-gpu lint lint-style lint-types lint-imports docs format wheel hf-kernel clean

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED) ## a virtual environment with the pinned set

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: '$(PYTHON)' is not Python 3.11 or newer; name one, e.g. make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[bench,peers,dev]'
	@touch $@

bench: $(INSTALLED) ## measure coordinate descent, on the GPU if there is one
	$(BIN)/python bench.py --suite coor_descent $(ARGS)

baseline: $(INSTALLED) ## measure all suites that take times or errors, for others to compare with: on an idle GPU, from a clean commit
	@test -n "$(NAME)" || { echo "make: name the device, e.g. make baseline NAME=nvidia-h200" >&2; exit 1; }
	$(BIN)/python bench.py $(patsubst %,--suite %,$(SUITES)) --out reports/$(NAME) $(ARGS)
	$(BIN)/python bench.py baseline reports/$(NAME) reports/baselines/$(NAME).jsonl

check: $(INSTALLED) ## compare with reports/baselines/cpu.jsonl what needs no GPU: kernels as compiled, memory, errors, speed-ups
	# Status 4: on a busy machine a time may stay undecided, which is printed and no regression.
	$(CHECK) --baseline reports/baselines/cpu.jsonl --check --any-machine $(ARGS) || [ $$? -eq 4 ]

baseline-cpu: $(INSTALLED) ## record anew what `make check` compares with: from a clean commit
	rm -rf reports/cpu
	$(CHECK) --out reports/cpu
	$(BIN)/python bench.py baseline reports/cpu reports/baselines/cpu.jsonl

test: test-alone test-plain test-interpreted ## all tests

test-alone: $(INSTALLED) ## tests that take times or memory, one after the other
	$(BIN)/python -m pytest tests -m "alone and not compiled" $(ARGS)

test-plain: $(INSTALLED) ## the other tests as they are: CPU paths, kernels as compiled, and the GPU if there is one
	$(BIN)/python -m pytest tests -m "not alone or compiled" -n $(WORKERS) --dist worksteal --benchmark-disable $(ARGS)

test-plans: $(INSTALLED) ## kernels of every plan that a launch may follow, in all variants and for all GPUs: takes hours
	EVERY_PLAN=1 $(BIN)/python -m pytest tests/kernels/test_launch_plans.py -m compiled -n $(WORKERS) --dist worksteal --timeout 0 --benchmark-disable $(ARGS)

test-interpreted: $(INSTALLED) ## tests of the kernels with Triton's interpreter in place of a GPU
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels -m "not compiled and not gpu" -n $(WORKERS) --dist worksteal --benchmark-disable $(ARGS)

test-gpu: $(INSTALLED) ## tests that need a GPU: those of times and memory one after the other, then the others
	$(BIN)/python -m pytest tests -m "gpu and alone" $(ARGS)
	$(BIN)/python -m pytest tests -m "gpu and not alone" -n $(WORKERS) --benchmark-disable $(ARGS)

test-gates: $(INSTALLED) ## accuracy gates on 20 problems of each case, by PyTorch's instruction sets and threads
	for isa in default avx2 avx512; do for threads in 1 2; do \
		echo "ATEN_CPU_CAPABILITY=$$isa OMP_NUM_THREADS=$$threads"; \
		ATEN_CPU_CAPABILITY=$$isa OMP_NUM_THREADS=$$threads GATE_SEEDS=20 \
			$(BIN)/python -m pytest tests/suites/test_gates.py --benchmark-disable $(ARGS) || exit 1; \
	done; done

lint: lint-style lint-types lint-imports ## all linters

lint-style: $(INSTALLED) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-types: $(INSTALLED) ## mypy
	$(BIN)/mypy

lint-imports: $(INSTALLED) ## directions of imports
	$(BIN)/lint-imports

docs: $(INSTALLED) ## documents and API as a site in site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(INSTALLED) ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(INSTALLED) ## a wheel of harness, operations and layers, in build/: colt5_bench, colt5.kernels, colt5.reference
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir build .

hf-kernel: $(INSTALLED) ## the layout of a Hugging Face kernel, in build/hf-kernel
	$(BIN)/python setup.py --quiet hf_kernel

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build site *.egg-info
