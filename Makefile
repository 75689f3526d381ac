# Each target makes its own virtual environment from a bare Python >= 3.11: `make test PYTHON=python3.12`.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv/$(VERSION)
BIN := $(VENV)/bin
# Compiled programs are kept between runs; nothing else is shared.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1

.PHONY: venv tpu demo test drill check bench parity docs format clean

venv: $(VENV)/ready

$(VENV)/ready: setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "kling_jax needs Python >= 3.11; set PYTHON=python3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

# The TPU compiler, which runs on any x86 machine. It stands beside the environment and not in it: with it installed,
# every start of JAX looks for TPUs and complains where there are none.
tpu: $(VENV)/libtpu/ready

$(VENV)/libtpu/ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/libtpu \
	  "$$($(BIN)/python -c 'from importlib.metadata import requires; print(next(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))')"
	touch $@

demo: venv
	$(BIN)/kling demo $(if $(VIDEOS),--videos "$(VIDEOS)") $(if $(WORKDIR),--workdir "$(WORKDIR)")

test: venv
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

drill: venv tpu
	$(BIN)/python -m pytest -m drill --timeout 1200

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_floors.py

bench: venv
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/sample.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/input_pipeline.py

# Every imported network against its reference in PyTorch; wants Python 3.11: `make parity PYTHON=python3.11`.
parity: venv
	$(BIN)/python -m pip install --quiet -e '.[parity]'
	$(BIN)/python benchmarks/parity.py

# The site in build/site; broken links fail. Addresses of other sites are listed, not called.
docs: venv
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/zensical build --clean --strict
	grep -rhoE 'https?://[^][ )>"`|]+' README.md docs --include='*.md' | sort -u > build/site/external_links.txt
	@echo "open build/site/index.html; $$(wc -l < build/site/external_links.txt) external links in build/site/external_links.txt"

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .cache build dist *.egg-info
