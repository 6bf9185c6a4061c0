# Five words: demo, test, check, bench, docs. Each makes the environment it needs; a stamp file says that it is made.

PYTHON ?= python3
TORCH := torch==2.13.0
BIN := .venv/bin
RECIPE := pyproject.toml constraints.txt
OLDEST := env PYTHONPATH=$(CURDIR)/.venv-oldest

.PHONY: demo test check bench docs

# Compare methods on real text: a quick pass, then the whole; the report is results/demo/report.html.
demo: .venv/.demo
	$(BIN)/deltatune compare --quick
	$(BIN)/deltatune compare

# Everything that must hold, on the newest and on the oldest supported transformers.
test: .venv/.dev .venv-oldest/.made
	$(BIN)/ruff check
	$(BIN)/pytest -n 2
	$(OLDEST) $(BIN)/python -c "import transformers as t; assert t.__version__ == '5.17.0', t.__version__"
	DELTATUNE_CONTRACT_SHARE=3 $(OLDEST) $(BIN)/pytest -n 2 $(wildcard tests/core tests/contract)

# What an editor would say: style, types, arrows.
check: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_imports.py

# Time and memory beside HF PEFT in the same run.
bench: .venv/.dev
	$(BIN)/python benchmarks/run.py

# The table of methods in README.md, docs/methods.md, and the pages on other libraries, from the code and its tests.
docs: .venv/.dev
	$(BIN)/python docs/make.py
	$(BIN)/python docs/make_foreign.py
	$(BIN)/python docs/make_peft.py

# torch first and by exact version: a range may bring gigabytes of CUDA to a machine without a GPU.
.venv/.torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt $(TORCH)
	touch $@

.venv/.demo: .venv/.torch $(RECIPE)
	$(BIN)/pip install -c constraints.txt -e .[demo]
	touch $@

.venv/.dev: .venv/.torch $(RECIPE)
	$(BIN)/pip install -c constraints.txt -e .[demo,dev]
	touch $@ .venv/.demo

# Only what differs from .venv, to be put in front of it on PYTHONPATH.
.venv-oldest/.made: .venv/.dev constraints-oldest.txt
	rm -rf .venv-oldest
	$(BIN)/pip install --no-deps --target .venv-oldest -r constraints-oldest.txt
	touch $@
