# `make demo` and `make test` are each enough on a fresh machine with Python 3.11 or newer, make and the package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUT := out/demo
PROMPT ?= The Prime Minister says the Government

.PHONY: demo test test-all lint kernels docs install clean

demo: $(INSTALLED)
	$(BIN)/fxpress compile fixtures/tiny-llama --pipeline w4a16 --calibration fixtures/calibration.txt \
		--text fixtures/test.txt --backend onnx --out $(OUT) --overwrite
	$(BIN)/fxpress generate $(OUT) --prompt "$(PROMPT)"
	$(BIN)/python tools/demo.py fixtures/tiny-llama $(OUT)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not thorough"

# With the costly cases of every kind too: all families everywhere.
test-all: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every kernel and every entry of the table, for three architectures, without a GPU: no spills, and no more instructions than committed.
kernels: $(INSTALLED)
	$(BIN)/python -m tools.kernel_counts --check

# The variable keeps a notice of the theme out of the output, on versions of mkdocs that constraints.txt rules out.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "fxpress needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) out build
