# Two commands: `make test` proves the installation, `make demo` shows the main job.
# `make test-all` runs what `make test` leaves out, `make mutants` every planted defect, `make docs` builds the site.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: install extras test test-all unit lint types docs notebook demo verify mutants package clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

test: install  # side by side: the type checker alone takes a minute of one core
	@$(MAKE) --no-print-directory -j 3 lint types unit

unit: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not needs"

test-all: extras $(VENV)/.docs  # what `make test` leaves out: training to convergence, kills, every family x method, the extras
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or needs" --extras -rs

extras: $(VENV)/.extras

$(VENV)/.extras: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[app,data,lowmem,logging]'
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

lint: install
	$(BIN)/ruff check src tests benchmarks docs/site setup.py

types: install
	$(BIN)/mypy

docs: $(VENV)/.docs  # build/site/index.html; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebook: $(VENV)/.docs  # runs docs/tutorials/scenes-64.ipynb again and keeps its outputs: minutes
	$(BIN)/python docs/site/notebook.py

demo: install
	OMP_NUM_THREADS=2 $(BIN)/fewstep demo

verify: install
	$(BIN)/fewstep verify

mutants: extras  # some defects are seen by tests that need them
	$(BIN)/python -m tests.mutants

package: install  # dist/: wheel and source distribution, each installed and run in an environment of its own
	$(BIN)/python benchmarks/package.py --out dist

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
