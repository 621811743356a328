# `make demo` and `make test`; `make compat` runs both ends of the promised versions, `make smoke` the benchmark, `make speed`
# and `make tables` write what the pages show. Each sets everything up on a machine that has Python 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-all compat lint smoke speed tables eval-env clean

demo: $(VENV)/.installed
	$(BIN)/ivtp demo --output out/demo

test: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile
	$(MAKE) smoke

# also what is marked slow: minutes more
test-all: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not gpu"
	$(MAKE) smoke

# what a change of torch, transformers or accelerate breaks first, on the lowest and on the newest of them
COMPAT_TESTS := tests/core tests/methods tests/hosts tests/towers tests/prefill tests/plug tests/test_parity.py tests/test_batching.py tests/stock \
	tests/test_reference.py tests/test_training.py

compat: $(VENV)/lowest/.installed $(VENV)/newest/.installed
	for end in lowest newest; do \
		OMP_NUM_THREADS=1 $(VENV)/$$end/bin/python -m pytest -q -n 2 --dist loadfile $(COMPAT_TESTS) || exit 1; \
	done

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# a few runs of the embedded model: shows that the benchmark works, its numbers are worth nothing
smoke: $(VENV)/.installed
	mkdir -p out
	$(BIN)/ivtp bench --repeats 3 --tokens 2 --text 32 --output out/smoke.json

# the tables of docs/speed.md, of results/speed/
speed: $(VENV)/.installed
	$(BIN)/python -m benchmarks.speed_table

# what README.md and docs/ say of methods, families, options and results
tables: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.tables

# what `ivtp eval` needs
eval-env: $(VENV)/.installed-eval

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch is named exactly: an open range would pull several gigabytes of CUDA packages
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

# lmms-eval without what it asks for: that would bring a torchvision which does not fit the torch above
$(VENV)/.installed-eval: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[eval]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps lmms-eval
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-eval
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,clients]'
	touch $@

$(VENV)/%/.installed: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv $(VENV)/$*
	$(VENV)/$*/bin/python -m pip install -q -c constraints-$*.txt torch
	$(VENV)/$*/bin/python -m pip install -q -c constraints-$*.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out build dist
