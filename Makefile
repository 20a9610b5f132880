# A fresh machine needs Python 3.11 or newer, make and g++; everything else is installed into .venv.
# A second run installs only what changed.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find exporter engines validators -type f -not -name '*.pyc')
TYPES := $(VENV)/types
PROMPT := The import statement

.PHONY: help demo test lint types clean

help:
	@echo "make demo   export the small checkpoint for ort-cpu, print the verdict and a generated text"
	@echo "make test   install and run the tests"
	@echo "make lint   ruff: rules and format"
	@echo "make types  mypy --strict"
	@echo "make clean  remove .venv, caches and the demo"

$(VENV)/.libraries: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no python3 of version 3.11 or newer was found" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "scikit-build-core==1.1.2" "cmake==4.4.4" "ninja==1.13.2" .
	@touch $@

$(VENV)/.tools: $(VENV)/.libraries
	$(BIN)/python -m pip install --quiet ".[dev,trt-rtx]"
	@touch $@

# Not editable: the tests run against what a wheel holds.
$(VENV)/.package: $(VENV)/.libraries $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
	@touch $@

demo: $(VENV)/.package
	$(BIN)/gptoss-export --target ort-cpu --model tests/data/tiny-gpt-oss --output demo/release --force
	@printf '\n%s' "$(PROMPT)"
	@$(BIN)/gptoss-export --quiet generate demo/release --prompt "$(PROMPT)"

# File by file on as many workers as cores and memory bear (tests/conftest.py), then alone what nothing may run beside.
# Both run in any case. 5 is pytest's exit code where none of the tests asked for is of that kind.
test: $(VENV)/.tools $(VENV)/.package
	@$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not serial" $(PYTEST_ARGS); beside=$$?; \
	$(BIN)/python -m pytest -m serial $(PYTEST_ARGS); alone=$$?; \
	[ $$beside -ne 5 ] || exit $$alone; \
	[ $$alone -ne 5 ] || exit $$beside; \
	exit $$((beside ? beside : alone))

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads the sources under their import names, as pyproject maps them into the wheel.
types: $(VENV)/.tools
	@mkdir -p $(TYPES)/gptoss_export
	@for folder in exporter engines validators; do ln -sfn "$(CURDIR)/$$folder" $(TYPES)/gptoss_export/$$folder; done
	cd $(TYPES) && MYPYPATH=. ../bin/mypy --config-file $(CURDIR)/pyproject.toml \
		--explicit-package-bases --namespace-packages gptoss_export

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find exporter engines validators tests -name __pycache__ -type d -prune -exec rm -rf {} +
