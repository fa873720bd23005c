# Set-up and every check of the project. `make demo` is the first thing to try.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DONE   := $(VENV)/.done
PROMPT ?= The history of the

NATIVE_SOURCES := CMakeLists.txt $(wildcard native/*)
CXX_SOURCES    := $(wildcard native/*.cpp native/*.h)
KERNELS        := src/jamba_lm/kernels/libjamba_kernels.so

# A stray user site or PYTHONPATH must not leak into the environment, and pip must not
# need a writable cache in the home directory.
unexport PYTHONPATH
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
MAKEFLAGS += --no-print-directory
PIP := $(BIN)/python -m pip --quiet

.PHONY: help setup native demo test lint format clean

help:
	@echo "make demo     set up, then let the embedded model continue a prompt (PROMPT='...')"
	@echo "make test     set up, then lint, types and the whole test suite"
	@echo "make setup    make $(VENV), install the pinned packages and build the native kernels"
	@echo "make native   build the native kernels again after a change in native/"
	@echo "make lint     ruff, mypy, codespell and clang-format alone;  make format: rewrite what they would complain about"
	@echo "make clean    remove $(VENV) and everything built"

setup: $(DONE)/project $(KERNELS)

demo: setup
	$(BIN)/jamba generate demo --prompt "$(PROMPT)" --echo --seed 7

# Two processes of one thread each: processes of two threads would take turns at waiting.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

native: $(KERNELS)

clean:
	rm -rf $(VENV) build dist src/*.egg-info src/jamba_lm/kernels/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Each step leaves a stamp, so that a second run starts at once and an interrupted one goes on
# where it stopped.
$(DONE)/venv:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE) && touch $@

# torch alone first: it is by far the largest, and everything else must accept this release.
$(DONE)/torch: $(DONE)/venv
	$(PIP) install torch==2.13.0 --constraint constraints.txt
	@touch $@

$(DONE)/packages: constraints.txt $(DONE)/torch
	$(PIP) install --requirement constraints.txt
	@touch $@

$(DONE)/project: pyproject.toml $(DONE)/packages
	$(PIP) install --no-build-isolation --no-index --editable '.[test]'
	@touch $@

# Renamed into place, for a running process may have the old library mapped. Without a compiler
# there is no library, and the next run looks for a compiler again.
$(KERNELS): $(NATIVE_SOURCES) | $(DONE)/packages
	$(BIN)/cmake --log-level=NOTICE -S . -B build/native -DJAMBA_WERROR=ON
	$(BIN)/cmake --build build/native --parallel
	$(BIN)/cmake --install build/native --prefix build/native/stage >/dev/null
	@new=build/native/stage/jamba_lm/kernels/$(@F); if [ -e $$new ]; then mv $$new $@ && touch $@; fi
