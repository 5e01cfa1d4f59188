# Two commands do everything on a machine with Python >= 3.11, make and a package registry:
#   make demo    sets up, then the whole way on the embedded default data
#   make test    sets up, then runs the tests
PYTHON ?= python3
BIN := .venv/bin
METAPIPE := $(BIN)/metapipe
STAMP := .venv/.installed

.PHONY: setup demo test lint soak constraints clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -3; echo "  make setup   only the set-up; make lint   ruff and mypy"

setup: $(STAMP)

$(STAMP): pyproject.toml infra/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed; $(PYTHON) is $$($(PYTHON) -V). Use make PYTHON=python3.12 …"; exit 2; }
	@echo "setting up .venv (a few GB, about a minute)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint infra/constraints.txt uv
	@# compiled once, here: where Python may not write bytecode, every process would compile torch and Ray anew (a minute)
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint infra/constraints.txt \
	  --editable '.[dev]'
	@$(BIN)/python -m pipeline.kernels || true
	@touch $@

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m jobs.demo

test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope  # what runs where: tests/conftest.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy infra/scaling infra/docker

# a hundred random kills on several processes, ten under Ray; half an hour
soak: setup
	$(BIN)/python -m tests.soak

# after a change of pyproject.toml: resolve anew and commit the result
constraints:
	$(BIN)/uv pip freeze --exclude-editable --python $(BIN)/python > infra/constraints.txt

clean:
	rm -rf .venv build *.egg-info
