# make demo: install and run the main job; make test: install what tests need and run them.
# Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin

.PHONY: install install-dev demo results parity faults test lint wheel

install: .venv/installed
install-dev: .venv/installed-dev

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# A device a core is faster; the rest keeps memory down.
CPU := XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_cpu_enable_concurrency_optimized_scheduler=false" MALLOC_ARENA_MAX=2

demo: install
	$(CPU) $(BIN)/python -m r0_jax.main --config=configs/shapes_r0.py --workdir=runs/shapes_r0

# About 20 minutes: all test prompts, three seeds; writes docs/results.md and its picture.
results: install
	$(CPU) $(BIN)/python -m r0_jax.results --config=configs/shapes_r0.py --workdir=runs/results \
	  --out=docs/results.md

test: lint
	$(BIN)/python -m pytest -n 2

# Writes down what the tests against PyTorch measure: docs/parity.md. Networks at full width, 24 GiB
# at most, one after another; what runs/parity holds of them already is not measured again.
parity: install-dev
	$(BIN)/python -m pytest tests/test_models_*.py tests/test_pipeline*.py \
	  tests/test_full_width.py -m "full_width or not full_width" \
	  --parity-report=docs/parity.md

# Runs killed, stopped, starved of disk and damaged, about a hundred of them, in a quarter of an
# hour on two cores; prints the counts and writes docs/faults.md. Without root no disk is mounted: files are
# limited in size instead.
faults: install-dev
	$(BIN)/python tests/support/faults.py --report=docs/faults.md

# Style, the direction of imports, types of the ground rooms.
lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

wheel:
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir=dist .
