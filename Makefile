# Every target sets up what it needs: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# What an installation depends on; an editable one follows the Python sources by itself.
INPUTS := pyproject.toml setup.py constraints.txt $(wildcard src/headway/kernels/cpu/*)

.PHONY: demo setup test pytest check format bench clean

demo: $(VENV)/.demo  ## train a small GPT on this machine's own documentation and write with it
	$(BIN)/headway demo

setup: $(VENV)/.test  ## the environment alone, with what the tests need

test: $(VENV)/.test  ## format, lint, types, budgets, tests: side by side, since the checks keep one core busy
	$(MAKE) --no-print-directory -j2 check pytest

pytest: $(VENV)/.test  ## the tests alone
	HEADWAY_TEST=1 PYTHONUNBUFFERED=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --durations 15

check: $(VENV)/.test  ## everything but the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict src
	$(BIN)/python tools/check_budget.py src
	$(BIN)/python tools/fault_rows.py

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.test  ## the figures of the README; each program prints one JSON line last
	for program in $$(grep -l __main__ benchmarks/*.py); do echo "== $$program"; $(BIN)/python $$program || exit 1; done

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot make an environment. Fix: install Python 3.11 or later with its venv module (Debian: apt install python3-venv)" >&2; exit 4; }

$(VENV)/.demo: $(BIN)/python $(INPUTS)
	@echo "installing headway into $(VENV); the first time this downloads PyTorch"
	$(PIP) -e '.[plots]'
	@touch $@

$(VENV)/.test: $(BIN)/python $(INPUTS)
	@echo "installing headway and its tests' tools into $(VENV); the first time this downloads PyTorch"
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
