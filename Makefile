# make demo   the whole method on handwritten digits, results in runs/demo
# make check  lint, sizes, the fast tests: two minutes
# make test   that, and the slow tests: eight minutes
# make kernels  CUTLASS, the kernels' resources on sm_90 and in part on two others, the interpreter at every shape
# make bench  all benchmarks, results in bench/results/<date>-<device>
# make ledger what a Hopper GPU would be given, counted without one, results in bench/results/<date>-ledger
# make docs   the documents as a site, docs/_build/html
# make asan   the extension's CPU code under AddressSanitizer, with the tests in ASAN_TESTS
# Each creates the environment in .venv and installs the package first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed
ALL_KERNELS := $(VENV)/.all_kernels
# Compiling every kernel for it takes a minute: the tests read the table that `make kernels` has just made.
RESOURCE_TABLE := $(VENV)/resources.txt
SOURCES := pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)
# A CUDA build, which brings 3 GB of libraries, in an environment of its own: the other one's is a CPU build as a rule.
LEDGER_TORCH ?= 2.14.1
LEDGER_VENV ?= .venv-ledger
LEDGER_BIN := $(LEDGER_VENV)/bin
LEDGER_FLAGS ?=
ASAN_TESTS ?= tests/ops -k 'extension or step or fused_adamw_ema or global_norm or augment_view or resized_crop'

.PHONY: install demo check test kernels lint resources bench ledger docs docs-links asan clean

install: $(INSTALLED)

# torch first and by its exact version: the extension is built against it, and a range may pull another build.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^torch==' constraints.txt)
	touch $@

# Whose figures the tests compare ours with. Of what they depend on nothing: torchvision has no build for most CPU torches.
OTHERS = $(PIP) --no-deps $$(grep -E '^(clean-fid|torch-fidelity)==' constraints.txt)

$(INSTALLED): $(VENV)/.torch $(SOURCES)
	$(PIP) -c constraints.txt -e '.[dev]'
	$(OTHERS)
	touch $@

# With CUTLASS's headers the build takes minutes longer where nvcc is; its package's dependencies are its Python tools'.
$(ALL_KERNELS): $(VENV)/.torch $(SOURCES)
	$(PIP) --no-deps $$(grep '^nvidia-cutlass==' constraints.txt)
	$(PIP) -c constraints.txt -e '.[dev]'
	$(OTHERS)
	touch $(INSTALLED) $@

demo: $(INSTALLED)
	$(BIN)/python demo/run.py runs/demo

# Two processes with one thread each are faster than one with two, on networks this small.
TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

check: $(INSTALLED) lint
	$(BIN)/python tools/size.py
	$(TESTS) -m 'not slow and not kernels' --budget 110

test: check
	$(TESTS) -m 'slow and not kernels' --budget 360

kernels: $(ALL_KERNELS) resources
	EPG_RESOURCE_TABLE=$(RESOURCE_TABLE) $(TESTS) -m kernels --budget 300

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# Nothing of sm_90 may spill; of the other two architectures a third is compiled.
resources: $(ALL_KERNELS)
	$(BIN)/python -m bench.resources --every 3 > $(RESOURCE_TABLE); code=$$?; cat $(RESOURCE_TABLE); exit $$code

bench: $(INSTALLED)
	$(BIN)/python -m bench

$(LEDGER_VENV)/.torch-$(LEDGER_TORCH):
	$(PYTHON) -m venv $(LEDGER_VENV)
	$(LEDGER_BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(LEDGER_TORCH) \
	  matplotlib numpy pillow pytest pytest-timeout pyyaml safetensors tqdm
	touch $@

# Its tests, then everything, e.g. LEDGER_FLAGS='--job sample_xl --variant ours-blocks auto-network'.
ledger: $(LEDGER_VENV)/.torch-$(LEDGER_TORCH)
	export PYTHONPATH=.:kernels && \
	standin=$$($(LEDGER_BIN)/python -c 'from bench.ledger.device import library; print(library())') && \
	LD_PRELOAD="$$standin" $(LEDGER_BIN)/python -m pytest -q tests/bench/test_ledger.py tests/bench/test_ledger_counts.py && \
	$(LEDGER_BIN)/python -m bench.ledger --output "bench/results/$$(date +%F)-ledger" $(LEDGER_FLAGS)

# The extension that is there stays.
$(VENV)/.docs: $(INSTALLED)
	EPG_BUILD_EXTENSION=0 $(PIP) -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# What the pages point to elsewhere; needs a network, and is no part of CI.
docs-links: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/links

# libstdc++ too, or throwing a C++ exception aborts. Slow tests call compilers, which crawl under preloaded libraries.
asan: $(INSTALLED)
	build=$$(mktemp -d) && trap 'rm -rf "$$build"' EXIT && \
	cmake -S . -B "$$build" -DCMAKE_BUILD_TYPE=Release -DEPG_SANITIZE=address -DEPG_BUILD_CUDA=0 -DEPG_OUTPUT_DIR="$$build" \
	  -DEPG_TORCH_DIR="$$($(BIN)/python -c 'import torch; print(*torch.__path__)')" && \
	cmake --build "$$build" && \
	export EPG_EXTENSION="$$build/_extension.abi3.so" ASAN_OPTIONS=detect_leaks=0 && \
	export LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" && \
	$(BIN)/python -c 'from epg_fast.ops import extension_status as s; print(s()[1]); raise SystemExit(not s()[0])' && \
	$(BIN)/python -m pytest -q --capture=sys -m 'not slow' $(ASAN_TESTS)

clean:
	rm -rf $(VENV) $(LEDGER_VENV) build dist docs/_build docs/flags docs/api/ops.md *.egg-info epg_fast/ops/*.so
