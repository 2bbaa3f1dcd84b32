# The two commands are `make demo` and `make test`. Each makes the environment it needs, once.
#
#   PYTHON=python3.12     the interpreter that makes the environment
#   VENV=/some/folder     where the environment is made
#   PIP_ARGS="..."        passed to pip, say for an index of CPU builds
#   NOENV=1               make none: PYTHON is used as it is, with the torch that it has (a CUDA one, say)
#   DEMO_ARGS="..."       passed to the demo; `make demo DEMO_ARGS=--help` lists them
#   TEST_ARGS="..."       passed to pytest

PYTHON ?= python3
VENV ?= .venv

# Threads that wait for one another sleep. They would spin, and where the machine does other work besides, that costs many times
# what it saves.
export OMP_WAIT_POLICY ?= passive

ifdef NOENV
PY := $(PYTHON)
READY :=
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
READY := $(VENV)/ready
endif

NUMPY_FLOOR := $(shell sed -n 's/.*"numpy>=\([0-9.]*\)".*/\1/p' pyproject.toml)

.PHONY: help env demo test test-long test-numpy lint format docs docs-check clean

help:
	@echo "make demo        train a small language model on one rank and on four, and compare (under 3 minutes)"
	@echo "make test        lint, types and tests (under 10 minutes on 2 cores)"
	@echo "make test-long   the same with the long tests"
	@echo "make test-numpy  the plans that are kept, with the oldest numpy and the newest"
	@echo "make lint        ruff and mypy alone;  make format  mends what ruff can"
	@echo "make docs        docs/api.md from the docstrings;  make docs-check  whether it is up to date"
	@echo "make env         the environment alone;  make clean  removes it and all that was made"

env: $(READY)

$(VENV)/ready: requirements-dev.txt requirements-triton.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -r requirements-dev.txt
	$(VENV)/bin/python -c "import triton" 2>/dev/null || \
		$(VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -r requirements-triton.txt
	$(VENV)/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps --no-build-isolation --editable .
	touch $@

demo: $(READY)
	$(PY) examples/train_llm/demo.py $(DEMO_ARGS)

# Whether docs/api.md is up to date is one of the tests.
test: lint
	$(PY) -m pytest $(TEST_ARGS)

# The plans that are kept, under the oldest numpy that pyproject.toml admits and the newest that there is for this interpreter.
test-numpy: $(READY)
	for numpy in "numpy==$(NUMPY_FLOOR).*" "numpy"; do \
		rm -rf $(VENV)/numpy && $(PY) -m pip install --quiet $(PIP_ARGS) --target $(VENV)/numpy "$$numpy" || exit 1; \
		PYTHONPATH=$(CURDIR)/$(VENV)/numpy $(PY) -m pytest tests/test_plan/test_golden.py tests/test_plan/test_same_everywhere.py \
			$(TEST_ARGS) || exit 1; \
	done

test-long: lint
	$(PY) -m pytest -m "long or not long" $(TEST_ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(READY)
	$(PY) scripts/make_api_docs.py

docs-check: $(READY)
	$(PY) scripts/make_api_docs.py --check

clean:
	rm -rf .venv build dist out .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
