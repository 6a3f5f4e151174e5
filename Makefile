# Each target does its own set-up: a machine with Python and make needs nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format clean

demo: $(VENV)/.demo
	$(BIN)/accelerate launch --num_processes 1 --cpu examples/how2_summarize.py --output_dir outputs/how2_mini

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs build dist .pytest_cache .mypy_cache .ruff_cache

# The demo needs less than the tests; --no-compile leaves byte-compiling to the first import of what is used.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e ".[examples,fast]"
	touch $@

$(VENV)/.installed: $(VENV)/.demo
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e ".[examples,fast,test,lint]"
	touch $@
