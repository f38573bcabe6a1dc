# shmrpc: every target makes the virtual environment it needs. See CONTRIBUTING.md.
#
#   make demo     run the demo
#   make test     C tests, then the Python tests          (PYTEST_ARGS="-k ring" passes options on)
#   make check    ruff, mypy, C warnings of gcc and clang, layer rule
#   make bench    benchmarks                              (BENCH_ARGS="-k unary")
#   make thorough the tests that `make test` leaves out for the time they take
#   make deep     models, sanitizers, fuzzers: needs spin and clang
#   make test-py  core tests over shm, for one more Python (PYTHON=python3.13 VENV=.venv-3.13)
#   make clean    remove everything that these made

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export PIP_ROOT_USER_ACTION := ignore

# What the native module is made of; Python files need no rebuild (the installation is editable).
BUILD_INPUTS := pyproject.toml setup.py $(wildcard csrc/*.c csrc/*.h csrc/cffi_build.py)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test thorough deep test-py check check-python check-c bench install install-core install-test install-dev \
	install-bench clean FORCE

help:
	@sed -n 's/^#   //p' Makefile

# --- Virtual environment -------------------------------------------------------------------------
# .stamp-venv    names the interpreter that the environment was made with: another one remakes it
# .stamp-build   the native module and the package are installed, and up to date with csrc/
# .stamp-EXTRA   what the extra asks for is installed

PYTHON_ID := $(shell $(PYTHON) -c 'import sys; print(sys.base_prefix, *sys.version_info[:3])')
ifeq ($(filter clean help,$(or $(MAKECMDGOALS),help)),)
ifeq ($(PYTHON_ID),)
$(error cannot run '$(PYTHON)': install Python 3.10 or newer, or say PYTHON=/path/to/python3)
endif
endif
ifneq ($(PYTHON_ID),$(file <$(VENV)/.stamp-venv))
$(VENV)/.stamp-venv: FORCE
endif
$(VENV)/.stamp-venv:
	$(PYTHON) -m venv --clear $(VENV)
	@echo '$(PYTHON_ID)' >$@

$(VENV)/.stamp-build: $(BUILD_INPUTS) $(VENV)/.stamp-venv
	$(PIP) install --editable .
	@touch $@

# Installs the package too, so that a fresh environment takes one build, not two.
$(VENV)/.stamp-core $(VENV)/.stamp-test $(VENV)/.stamp-dev $(VENV)/.stamp-bench: $(VENV)/.stamp-%: pyproject.toml $(VENV)/.stamp-venv
	$(PIP) install --editable '.[$*]'
	@touch $@ $(VENV)/.stamp-build

# Not as prerequisites of .stamp-build: a change in csrc/ rebuilds once, whatever extras there are.
install: $(VENV)/.stamp-build
install-core: $(VENV)/.stamp-core $(VENV)/.stamp-build
install-test: $(VENV)/.stamp-test $(VENV)/.stamp-build
install-dev: $(VENV)/.stamp-dev $(VENV)/.stamp-build
install-bench: $(VENV)/.stamp-bench $(VENV)/.stamp-build

# The tests wait most of the time: two processes run them on each CPU, a file in one of them.
IN_PARALLEL := --numprocesses $(shell expr $$(nproc) \* 2) --dist loadfile

CORE_TESTS := $(addprefix tests/test_,calls.py futures.py errors.py death.py fork.py)

# --- Targets -------------------------------------------------------------------------------------

demo: install
	$(BIN)/shmrpc demo

test: install-test
	$(MAKE) -C csrc test
	$(BIN)/python -m pytest tests -m 'not deep and not thorough' $(IN_PARALLEL) $(PYTEST_ARGS)

thorough: install-test
	$(BIN)/python -m pytest tests -m thorough $(IN_PARALLEL) $(PYTEST_ARGS)

deep: install-test
	$(BIN)/python -m pytest tests -m deep $(PYTEST_ARGS)

test-py: install-core
	$(BIN)/python -m pytest $(CORE_TESTS) $(IN_PARALLEL) -m 'not slow' -k 'not unix and not tcp' $(PYTEST_ARGS)

check: check-python check-c

check-python: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/python -m pytest tests/test_layers.py --quiet

check-c:
	@for tool in gcc clang; do command -v $$tool >/dev/null || \
		{ echo "make check: $$tool is not installed; run: apt-get install $$tool" >&2; exit 1; }; done
	$(MAKE) -C csrc check

bench: install-bench
	$(BIN)/python -m pytest benchmarks --benchmark-only --timeout=0 -o faulthandler_timeout=0 $(BENCH_ARGS)

clean:
	-test ! -e csrc/Makefile || $(MAKE) -C csrc clean
	rm -rf .venv .venv-* build dist *.egg-info shmrpc/_native.c shmrpc/_native.o shmrpc/_native*.so csrc/*.o
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
