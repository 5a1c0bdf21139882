# make demo   set up .venv and run the main job on this machine's CPU or GPU
# make demo-grpo  the same model learns from rewards that a client sends
# make test   set up and run the tests that guard every change; COVERAGE=1 measures the core's coverage, WORKERS=n
# make test-all  these and all below: slow, crash, short-chaos, clients
# make slow   tests that take more than ten seconds each
# make clients  run another project's GRPO client against this server, in an environment of its own
# make crash  kill a server and its processes at every fault point, one after the other
# make short-chaos  a quarter of a minute of chaos, of each kind
# make lint   set up and run ruff, mypy and the import walls
# make chaos  set up, then kill and disturb a server for CHAOS_MINUTES (1), and see whether anything was lost;
#             CHAOS_FLAGS=--disk also fills its disk now and then (needs root)
# make bench  set up and measure; figures go to bench/results.json
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PLUGINS := $(wildcard plugins/*)
PACKAGES := . $(PLUGINS)
STAMP := $(VENV)/.set-up
# For two cores: tests wait for processes half of their time.
WORKERS ?= 3
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python -m pytest $(SPREAD)
TESTS := tests $(addsuffix /tests,$(PLUGINS))
LATER := slow or crash or chaos or clients
# COVERAGE=1 holds the core to the floor of its coverage; the run takes half as long again.
ifdef COVERAGE
override COVERAGE := --cov --cov-report=term:skip-covered --cov-fail-under=85
endif
# Processes that share cores must not spin: two OpenMP pools on two cores slow a step fifty-fold.
export OMP_WAIT_POLICY := PASSIVE
export KMP_BLOCKTIME := 0
export TOKENIZERS_PARALLELISM := false
# A thousand processes begin: each of them would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo demo-grpo test test-all slow test-minimal clients crash short-chaos lint format chaos bench docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard plugins/*/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
		|| { echo "Arbor needs Python 3.11 to 3.13; $$($(PYTHON) --version) was found. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "No virtual environment could be made. On Debian: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[test,lint,demo]' $(foreach plugin,$(PLUGINS),-e $(plugin))
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

demo-grpo: $(STAMP)
	$(BIN)/python examples/demo_grpo.py

test: $(STAMP)
	$(PYTEST) -m "not ($(LATER))" $(COVERAGE) $(TESTS)

slow: $(STAMP)
	$(PYTEST) -m "slow and not (crash or chaos or clients)" $(TESTS)

test-all: test slow crash short-chaos clients

# The core and the mock plugin alone, in an environment without any machine-learning library.
test-minimal:
	test -x $(VENV)-minimal/bin/python || $(PYTHON) -m venv $(VENV)-minimal
	$(VENV)-minimal/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]' -e plugins/arbor_mock
	$(VENV)-minimal/bin/python -m pytest $(SPREAD) -m "not (ml or $(LATER))" tests plugins/arbor_mock/tests

# Another project's GRPO client, unchanged, in an environment of its own (its package alone: what it needs is a server's).
clients: $(STAMP) $(VENV)-clients/.set-up
	ARBOR_CLIENTS_PYTHON=$(abspath $(VENV)-clients/bin/python) $(BIN)/python -m pytest -m clients plugins/arbor_grpo/tests/test_client.py

$(VENV)-clients/.set-up:
	test -x $(VENV)-clients/bin/python || $(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/python -m pip install --quiet --disable-pip-version-check dspy==3.4.1 requests
	$(VENV)-clients/bin/python -m pip install --quiet --disable-pip-version-check --no-deps arbor-ai==0.2.17
	@touch $@

crash: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m crash tests

short-chaos: $(STAMP)
	$(BIN)/python -m pytest -m chaos tests/system/test_chaos.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

chaos: $(STAMP)
	STATE_EXAMPLES=50 $(BIN)/python -m pytest -q tests/dispatch/test_state_machine.py
	$(BIN)/python tests/support/chaos.py $(CHAOS_FLAGS)

bench: $(STAMP)
	$(BIN)/python bench/run.py

docs: $(STAMP)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) $(VENV)-minimal $(VENV)-clients build dist demo-out .pytest_cache .mypy_cache .ruff_cache .coverage*
