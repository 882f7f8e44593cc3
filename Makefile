# make run    set up and run the whole pipeline on the shipped base
# make test   set up and run all tests
# make check  lint, types and tests
# make docs   build the pages in build/docs and check their links
# make audit  ask the advisory service about every pinned library; a library that it does not know is a failure
# make torture  kills, failing disks, hostile input, 10,000 frames: what docs/reliability.md shows (an hour)
# make bench  set up and compare time and memory with the published recipe (on a machine that does nothing else)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Two tests beside each other, a file at a time: 19 minutes instead of 30 on 2 cores
SPREAD := -n 2 --dist loadfile
READY  := $(VENV)/.ready-$(shell cat constraints.txt pyproject.toml | sha256sum | cut -c1-16)

.PHONY: run test check docs audit torture bench setup clean

run: setup
	$(BIN)/orion toolchain
	$(BIN)/orion run

test: setup
	$(BIN)/python -m pytest $(SPREAD)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(SPREAD)

# Warnings are errors: a link to a page, heading or file that is not there is one. The second pass lists other sites.
docs: setup
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	$(BIN)/python -m sphinx -b linkcheck docs build/links | sed -n 's/-ignored-/links to/p'
	@echo "build/docs/index.html"

audit: setup
	$(BIN)/pip-audit --strict --require-hashes --disable-pip -r constraints.txt

torture: setup
	test -n "$(wildcard runs/*/gguf/pair.json)" || $(MAKE) run
	$(BIN)/python benchmarks/torture.py

# ONLY="training frame" does some of them; the rest of the options: benchmarks/speed.py --help
bench: setup
	test -n "$(wildcard runs/*/gguf/pair.json)" || $(MAKE) run
	$(BIN)/python benchmarks/speed.py $(if $(ONLY),--only $(ONLY))

setup: $(READY)

# pip refuses hashes together with an editable install, hence two steps.
$(READY): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	rm -f $(VENV)/.ready-*
	touch $@

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache
