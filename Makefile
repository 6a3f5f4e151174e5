# Each target does its own set-up: a machine with Python and make needs nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CORES = $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
# What pip takes for torch may be a build of several GB; TORCH=torch==2.13.0, or a wheel's path, chooses another.
TORCH_OLDEST := torch==2.6.0
TORCH_NEWEST := torch
FAST_TESTS := $(addprefix tests/test_,adapter.py adapter_lifecycle.py adapter_generation.py alignment.py \
	alignment_trainer.py versions.py)

.PHONY: demo test test-slow test-oldest test-newest lint format docs clean

demo: $(VENV)/.demo
	$(BIN)/accelerate launch --config_file examples/accelerate/one_cpu.yaml --num_cpu_threads_per_process $(CORES) \
		examples/how2_summarize.py --output_dir outputs/how2_mini

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=15 -m "not slow" tests

# What takes minutes each: 119 model families, kills at every write, 2,000 transport problems, every kernel compiled.
test-slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow tests

# The lowest versions of the window, in an environment of their own.
test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist worksteal -m "not slow" $(FAST_TESTS)

# What pip resolves today: made anew on every call.
test-newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q --no-compile "$(or $(TORCH),$(TORCH_NEWEST))"
	.venv-newest/bin/python -m pip install -q --no-compile -e . pytest pytest-xdist
	.venv-newest/bin/python -m pip list
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 --dist worksteal -m "not slow" $(FAST_TESTS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, strictly and offline, into site/: the pages are read from the source, so that torch is not needed.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-docs outputs site build dist .pytest_cache .mypy_cache .ruff_cache

# The demo needs less than the tests; --no-compile leaves byte-compiling to the first import of what is used.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e ".[examples,fast]"
	touch $@

$(VENV)/.installed: $(VENV)/.demo
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e ".[examples,fast,test,lint]"
	touch $@

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --no-compile -c constraints-oldest.txt "$(or $(TORCH),$(TORCH_OLDEST))"
	.venv-oldest/bin/python -m pip install -q --no-compile -c constraints-oldest.txt -e . pytest pytest-xdist
	touch $@

.venv-docs/.installed: pyproject.toml constraints.txt
	rm -rf .venv-docs
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q --no-compile -c constraints.txt \
		mkdocs-material "mkdocstrings[python]" latex2mathml
	touch $@
