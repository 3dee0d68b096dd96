# make demo and make test do all the set-up on a fresh machine: Python 3.11+, git and make are enough.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: setup dev demo test mutants storm lint
setup: .venv/.setup
dev: .venv/.dev

# A set-up over an older one first takes away what was installed without its requirements: the check would name them.
.venv/.setup: requirements.txt requirements-cpu.txt requirements-v100.txt $(wildcard requirements/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	file=$$(sh requirements/pick.sh) && $(PIP) -r $$file && \
	  if [ $$file = requirements-cpu.txt ]; then \
	    $(BIN)/pip uninstall -qq --yes -r requirements/no-deps.txt -r requirements/no-deps-cpu.txt && $(BIN)/pip check && \
	    $(PIP) --no-deps -r requirements/no-deps-cpu.txt; fi
	$(PIP) --no-deps -r requirements/no-deps.txt
	@touch $@

.venv/.dev: .venv/.setup
	$(PIP) -r requirements/dev.txt
	@touch $@

demo: setup
	$(BIN)/python demo.py

test: dev
	$(BIN)/python tests/fetch_tokenizers.py
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu" -rs --durations=10

# Hours; not a part of the gate. One room: make mutants ROOMS=metrics
mutants: dev
	$(PIP) -r requirements/mutants.txt
	$(BIN)/python tests/mutants.py $(ROOMS)

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ksat *.py

# Fuzzed inputs, damaged files, kills: hours. Not in the gate, which runs a small part of it.
storm: dev
	$(BIN)/python tests/storm
