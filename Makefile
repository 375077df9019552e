# Two commands for everybody: `make demo` and `make test`. Both set up all that they need.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: help demo test test-rabbitmq4 test-cluster sim sim-mutants hostile chaos chaos-mutants bench lint format clean

help: ## say what there is
	@sed -n 's/^\([a-z0-9-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

demo: $(VENV)/ready-demo ## see a private broker, a scheduler, two workers and a real Debian build
	@$(BIN)/mqworker demo --directory .demo

test: $(VENV)/ready-dev ## lint, types, import floors, and all tests, on a real broker and a real sbuild
	@$(BIN)/mqworker demo --prepare-only || test $$? = 3
	@deploy/install-postgresql || echo "without PostgreSQL, its tests are skipped"
	@$(MAKE) --no-print-directory lint
	@PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --numprocesses=4 # most of them wait for programs that they have started

RABBITMQ ?= 4.0 4.3
TESTS ?= tests/live
test-rabbitmq4: $(VENV)/ready-dev ## the tests that need a broker, or TESTS, on each RabbitMQ of RABBITMQ="4.0 4.3", in a folder
	@$(BIN)/mqworker demo --prepare-only || test $$? = 3
	@$(BIN)/python -m tests.roots $(RABBITMQ)
	@for version in $(RABBITMQ); do echo "tests with RabbitMQ $$version"; MQWORKER_TEST_RABBITMQ=$$version PYTHONDONTWRITEBYTECODE= \
	  $(BIN)/pytest --numprocesses=4 --deselect tests/live/test_demo.py $(TESTS) || exit; done

test-cluster: $(VENV)/ready-dev ## a pool on three RabbitMQ nodes that are killed, frozen and parted
	@$(BIN)/mqworker demo --prepare-only || test $$? = 3
	@PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -m cluster tests/live

SEEDS ?= 1000
sim: $(VENV)/ready-dev ## a whole pool on a virtual clock, from SEEDS=1000 seeds, with every promise checked
	@$(BIN)/python -m tests.sim --seeds 1-$(SEEDS)

sim-mutants: $(VENV)/ready-dev ## break the pool in each known way, and show the seed that notices
	@$(BIN)/python -m tests.sim.mutants

MESSAGES ?= 1000000
SEED ?= 1
hostile: $(VENV)/ready-dev ## MESSAGES=1000000 generated and mutated messages to everybody who reads, each accounted for
	@$(BIN)/python -m tests.hostile --messages $(MESSAGES) --seed $(SEED)

MINUTES ?= 60
LEDGER ?= postgresql
chaos: $(VENV)/ready-dev ## set a real pool on fire for MINUTES=60 and judge what is left (LEDGER=sqlite: no standby); writes chaos.md
	@$(BIN)/python -m tests.chaos --minutes $(MINUTES) --ledger $(LEDGER) --report chaos.md $(CHAOS)

chaos-mutants: $(VENV)/ready-dev ## break the pool in some ways, burn each for three minutes, and show what is noticed
	@$(BIN)/python -m tests.chaos.mutants

bench: $(VENV)/ready-dev ## what passes, beside Celery and Dramatiq, and what matching costs; rewrites tables in README.md (BENCH='--only throughput --quick')
	@$(BIN)/mqworker demo --prepare-only || test $$? = 3
	@deploy/install-postgresql
	@$(BIN)/python -m benchmarks $(BENCH)

lint: $(VENV)/ready-dev ## ruff, mypy, and the floors a file may import
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

format: $(VENV)/ready-dev ## put every file into the house's layout
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format --quiet .

clean: ## remove what these commands have made here
	rm -rf $(VENV) .demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/ready-demo: pyproject.toml | $(VENV)/made
	@echo "installs Python packages into $(VENV)"
	@$(PIP_INSTALL) --editable '.[debian]'
	@touch $@

$(VENV)/ready-dev: pyproject.toml | $(VENV)/made
	@echo "installs Python packages into $(VENV)"
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/made:
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || deploy/install-python
	@$(PYTHON) -m venv $(VENV)
	@touch $@
