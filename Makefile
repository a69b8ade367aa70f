# make demo   the whole method on handwritten digits, results in runs/demo
# make test   lint, kernel resource table, the whole test suite
# Both create the environment in .venv and install the package first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lint resources bench clean

install: $(INSTALLED)

# torch first and by its exact version: the extension is built against it, and a range may pull another build. So are the
# headers of CUTLASS, whose package's own dependencies only its Python tools need.
$(INSTALLED): pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $$(grep '^nvidia-cutlass==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python demo/run.py runs/demo

# Two processes with one thread each are faster than one with two, on networks this small.
test: lint resources
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

resources: $(INSTALLED)
	$(BIN)/python -m bench.resources

bench: $(INSTALLED)
	$(BIN)/python -m pytest bench/ops --benchmark-only

clean:
	rm -rf $(VENV) build dist *.egg-info epg_fast/ops/*.so
