# Two commands do everything on a fresh machine with Python >= 3.11 and make:
#   make verify   the gate        make test   tests of the code, those that are not slow
# And beside them:
#   make slow     the slow tests of the code                make mutate   each line of the definition changed in turn, hours
#   make judge    the gate itself on trial, 20 minutes; ARGS='--changed --keep': what a change made untrue of its record
#   make diagnose the catalogue's mistakes in others' code, and whether `python -m verify drift` names them, 14 minutes
#   make versions do the references agree under the oldest and the newest transformers that is allowed? A minute, once built
#   make full     all of it: judge with 60 random checkpoints and diagnose, kept as records; slow tests; long contexts
#   make docs     rewrites what README.md and docs/ have from code and kept records, a minute
#   make release-check   is there a release to be made? Not where a full run was of other code than this
#   make train    repeats the training of the small checkpoint, two hours (LAYOUT=half-split for the other one)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
TRIED := $(shell sed -nE 's/^(OLDEST|NEWEST) = "([0-9.]+)".*/\2/p' reference/versions.py)
UNDER := .venv-versions
LAYOUT ?= interleaved

.PHONY: verify test slow versions judge diagnose full release-check mutate train docs lint clean

verify: $(READY)
	$(BIN)/python -m pytest verify/ $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest tests/ -n 2 --dist loadfile -m "not slow" $(ARGS)

slow: $(READY)
	$(BIN)/python -m pytest tests/ -n 2 --dist loadfile -m slow $(ARGS)

versions: $(TRIED:%=$(UNDER)/%/.ready)
	for version in $(TRIED); do echo "transformers $$version"; \
	$(UNDER)/$$version/bin/python -m pytest verify/claims/test_references.py -q $(ARGS) || exit; done

judge: $(READY)
	$(BIN)/python -m verify judge $(ARGS)

diagnose: $(READY)
	$(BIN)/python -m tests.carried --drift $(ARGS)

full: $(READY)
	$(BIN)/python -m verify judge --random 60 --keep
	$(BIN)/python -m tests.carried --drift --keep
	$(BIN)/python -m pytest tests/ -n 2 --dist loadfile
	$(BIN)/python -m pytest verify/claims/test_long.py --long

release-check: $(READY)
	$(BIN)/python -m verify judge --kept --release
	$(BIN)/python -m tests.carried --release

mutate: $(READY)
	$(BIN)/python -m verify.selftest.mutation $(ARGS)

train: $(READY)
	$(BIN)/python -m reference.train --indexer-rope $(LAYOUT) --out training/$(LAYOUT) $(ARGS)
	$(BIN)/python -m reference.measure training/$(LAYOUT)/checkpoint

docs: $(READY)
	$(BIN)/python -m docs.blocks

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# torch first and alone: a range that another package states could choose a build of several gigabytes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is due; set PYTHON=python3.12, say")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[verify,dev]'
	touch $@

# The same, but for one version. The folder of each is its virtual environment.
$(UNDER)/%/.ready: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	{ grep -v '^transformers==' constraints.txt; echo transformers==$*; } > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt -e '.[verify]'
	touch $@

clean:
	rm -rf $(VENV) $(UNDER) .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
