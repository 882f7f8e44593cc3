# make run    set up and run the whole pipeline on the shipped base; MISSION=missions/waterfront.toml: another mission
# make test   set up and run all tests
# make quick  those that need no model and no server, in a minute
# make lint   style and types
# make check  lint, then test
# make docs   build the pages in build/docs and check their links
# make audit  ask the advisory service about every pinned library; a library that it does not know is a failure
# make torture  kills, failing disks, hostile input, 10,000 frames: what docs/reliability.md shows (an hour)
# make bench  set up and compare time and memory with the published recipe (on a machine that does nothing else)
# make pins   write constraints.txt and constraints-dev.txt from the ranges in pyproject.toml

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# What each of the two environments was made from: another set of pins makes it again.
READY     := $(VENV)/.ready-$(shell cat constraints.txt pyproject.toml | sha256sum | cut -c1-16)
READY_DEV := $(VENV)/.ready-dev-$(shell cat constraints*.txt pyproject.toml | sha256sum | cut -c1-16)
PINS := --universal --python-version 3.11.5 --generate-hashes --quiet --custom-compile-command "make pins"
# Three tests beside each other: on 2 cores, one of them waits for a server or a timeout in a tenth of the time
SPREAD := -n 3 --dist loadfile --no-loadscope-reorder

# A run and its tests start many interpreters; without compiled modules each of them reads 25 s of sources again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test quick check lint docs audit torture bench setup setup-dev pins clean

run: setup
	$(BIN)/orion run $(if $(MISSION),--mission $(MISSION))

test: setup-dev
	$(BIN)/python -m pytest $(SPREAD)

quick: setup-dev
	$(BIN)/python -m pytest $(SPREAD) -m "not slow and not llama_cpp and not browser"

check: lint test

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Warnings are errors: a link to a page, heading or file that is not there is one. The second pass lists other sites.
docs: setup-dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	$(BIN)/python -m sphinx -b linkcheck docs build/links | sed -n 's/-ignored-/links to/p'
	@echo "build/docs/index.html"

audit: setup-dev
	$(BIN)/pip-audit --strict --require-hashes --disable-pip -r constraints.txt -r constraints-dev.txt

torture: setup-dev
	test -n "$(wildcard runs/*/gguf/pair.json)" || $(MAKE) run
	$(BIN)/python benchmarks/torture.py

# ONLY="training frame" does some of them; the rest of the options: benchmarks/speed.py --help
bench: setup-dev
	test -n "$(wildcard runs/*/gguf/pair.json)" || $(MAKE) run
	$(BIN)/python benchmarks/speed.py $(if $(ONLY),--only $(ONLY))

setup: $(READY)

setup-dev: $(READY_DEV)

# uv installs the pins in a fifth of pip's time; pip is asked where uv cannot be had, or does not know the index.
# Hashes and an editable install exclude each other, hence two steps.
define install
$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes $(1) \
	|| $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes $(1)
endef

$(READY): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed -n '/^uv==/,/^ *#/p' constraints.txt > $(VENV)/uv.txt
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt
	$(call install,-r constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	rm -f $(VENV)/.ready-*
	touch $@

$(READY_DEV): $(READY) constraints-dev.txt
	$(call install,-r constraints-dev.txt)
	rm -f $(VENV)/.ready-dev-*
	touch $@

# Pins that still fit stay as they are; UPGRADE=--upgrade takes the newest.
pins: setup
	$(BIN)/uv pip compile $(PINS) pyproject.toml --extra imagery --group setup $(UPGRADE) -o constraints.txt
	$(BIN)/uv pip compile $(PINS) --group dev -c constraints.txt $(UPGRADE) -o constraints-dev.txt

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache
