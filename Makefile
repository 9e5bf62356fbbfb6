# make demo: install and run the main job; make test: install what tests need and run them.
# Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin

.PHONY: install install-dev demo results parity faults fuzz fullsize clients test lint docs wheel

install: .venv/installed
install-dev: .venv/installed-dev

.venv/installed: pyproject.toml setup.py requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/installed-dev: requirements-convert.txt requirements-demo.txt requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# A device a core is faster; the rest keeps memory down.
CPU := XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_cpu_enable_concurrency_optimized_scheduler=false" MALLOC_ARENA_MAX=2

demo: install
	$(CPU) $(BIN)/python -m r0_jax.main --config=configs/shapes_r0.py --workdir=runs/shapes_r0

# An hour or more: three variants, five seeds, all test prompts; writes docs/reports/results.md and
# its picture. A killed one continues.
results: install
	$(CPU) $(BIN)/python -m r0_jax.ablate --config=configs/ablations/shapes.py \
	  --workdir=runs/results --out=docs/reports/results.md

# Neighbours mostly stay in one process, so that what a module's tests share is made once.
test: lint
	$(BIN)/python -m pytest -n 2 --dist=worksteal --durations=60

# Write down what the tests against PyTorch measure: docs/reports/parity.md. Networks at full width
# need 24 GiB at most and run one after another. What runs/parity holds is not measured again.
parity: install-dev
	$(BIN)/python -m pytest tests/models tests/pipelines tests/test_full_width.py \
	  -m "full_width or not full_width" --parity-report=docs/reports/parity.md

# Kill, stop, starve and damage about a hundred runs: a quarter of an hour on two cores. Prints the
# counts and writes docs/reports/faults.md. Without root no disk is mounted: files are limited in
# size instead.
faults: install-dev
	$(BIN)/python tests/support/faults.py --report=docs/reports/faults.md

# Give spoiled files and odd flags to every reader and command, 2,500 cases in ten minutes on two
# cores. Prints the faults and writes docs/reports/fuzz.md.
fuzz: install-dev
	$(BIN)/python tests/support/fuzz.py --report=docs/reports/fuzz.md

# Random weights at the full size of SD 1.5, SDXL and SD3: plan, train, kill, resume, export, stock
# diffusers. Hours on a CPU, 24 GiB of memory, 60 GB of disk in runs/fullsize, whose results are not
# made again. Writes docs/reports/fullsize.md. One family: make fullsize FLAGS=--family=sd15
fullsize: install-dev
	$(BIN)/python -m benchmarks.fullsize --out=docs/reports/fullsize.md $(FLAGS)

# Give every export to the programs that it is for. Writes docs/reports/clients.md. Without flags only
# stock diffusers is tried; others are given: make clients FLAGS='--family=sd15 --comfyui=DIR
# --comfyui_python=FILE'. SD 1.5 takes a quarter of an hour and 8 GiB. runs/clients holds what is
# not done again.
clients: install-dev
	$(BIN)/python -m benchmarks.clients --out=docs/reports/clients.md $(FLAGS)

# Style, the direction of imports, types of the ground rooms.
lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

# Write docs/api again, from the docstrings.
docs:
	$(PYTHON) docs/make_api.py

wheel:
	rm -rf build  # where files of an earlier wheel would lie
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir=dist .
