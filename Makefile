# make demo   install into .venv, generate data, prepare, train, evaluate, print a table of results
# make test   run the tests
# make lint   check format, lint and types
# make docs   write docs/configuration.md from the settings
# make bench  run the benchmarks
# make clean  remove .venv, caches and build files
# Another build of PyTorch: make demo TORCH="torch==2.9.1 --index-url ..."
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs bench clean

demo: $(VENV)/installed
	$(BIN)/tron demo

# The tests are many and small: one process per core, each with one thread.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/installed
	$(BIN)/python -m tron_cli.config.page > docs/configuration.md.new
	mv docs/configuration.md.new docs/configuration.md

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is quiet, so a line says what takes so long.
$(VENV)/installed: pyproject.toml
	@echo "Installing into $(VENV): this takes about a minute, or longer while PyTorch is downloaded ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
