# make demo   install into .venv, draw a grid of digits, time the providers      (PYTHON=python3: no .venv, no network)
# make test   install into .venv and run every check: lint, types, tests
# make gpu    kernels and engine on an NVIDIA GPU: tests, graphs, compute-sanitizer, timings   (ten minutes, RESULTS=out/gpu)
# make wheel  a wheel in dist/; ARCHS="8.0;9.0" puts machine code for those GPUs into it, PRESETS=digits of fewer networks
# make clean  what make made

VENV := .venv
STAMP := $(VENV)/.installed
OUT ?= out/demo
RESULTS ?= out/gpu

ifdef PYTHON
  # a locked-down machine: this interpreter as it is, straight from the source tree
  PY := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)
  READY := in-place
else
  PY := $(VENV)/bin/python
  READY := $(STAMP)
endif

  # a process a core, each test on one thread; a file's tests in one process, which makes what they share once
PARALLEL = $(shell $(PY) -c 'import xdist._version as v; assert v.version_tuple >= (3, 7); \
  print("-n auto --dist loadfile --no-loadscope-reorder")' 2>/dev/null)

.PHONY: help demo test gpu lint wheel clean in-place
help:
	@sed -n '/^#/s/^# //p' Makefile

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/launcher/*)
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt torch setuptools wheel
	$(VENV)/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

in-place:
	@$(PY) -c 'import torch' 2>/dev/null \
	  || { echo "$(PYTHON) has no torch (2.10 to 2.13): name one that has, or leave PYTHON= away" >&2; exit 1; }
	@$(PY) setup.py -q build_ext --inplace > build_ext.log 2>&1 && rm -f build_ext.log \
	  || echo "the extensions cannot be built here, going on without them: see build_ext.log"

demo: $(READY)
	$(PY) -m sign_fast.cli generate --network digits-uncond --seeds 0-99 --batch 100 --outdir $(OUT)/images --grid $(OUT)/digits.png
	$(PY) benchmarks/throughput.py --quick --outdir $(OUT)
	@echo "digits: $(OUT)/digits.png   throughput: $(OUT)/throughput.json, $(OUT)/throughput.png"
	@test ! -x $(VENV)/bin/sign-fast || echo "next: source $(VENV)/bin/activate, then sign-fast --help"

lint: $(READY)
	@if $(PY) -c 'import ruff' 2>/dev/null; then $(PY) -m ruff check . && $(PY) -m ruff format --check .; \
	  else echo "ruff is not installed here: no lint"; fi
	@if $(PY) -c 'import mypy' 2>/dev/null; then $(PY) -m mypy; else echo "mypy is not installed here: no types"; fi

test: lint
	$(PY) -m pytest $(PARALLEL)
	TRITON_INTERPRET=1 $(PY) -m pytest $(if $(PARALLEL),-n auto --dist worksteal) tests/kernels_triton

gpu: $(filter-out in-place,$(READY))  # building the extension is its own first step
	@$(PY) benchmarks/gpu.py --results "$(RESULTS)"

wheel: $(READY)
	$(if $(ARCHS),SIGN_FAST_ARCHS="$(ARCHS)") $(if $(PRESETS),SIGN_FAST_PRESETS="$(PRESETS)") $(PY) -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) build dist out *.egg-info sign_fast/*.so kernels/extension_build.json kernels/packs/*.zip build_ext.log .mypy_cache .ruff_cache .pytest_cache
