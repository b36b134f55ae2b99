# `make test` and `make demo` need nothing but Python 3.11 or newer: they create .venv where it is missing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install test test-slow test-arithmetic lint format types docs demo converge table bench study study-quick clean

install: $(INSTALLED)

# torch first: left to the resolver, another build of it may be chosen.
$(INSTALLED): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,docs,tensorboard]'
	touch $@

# Two processes of one thread each.
test: install
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder --durations 15

test-slow: install
	$(BIN)/python -m pytest -m slow

# The tests where float32 sums are taken in another order: other vector units of the CPU, two threads.
test-arithmetic: install
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder
	ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder
	ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder
	FLOWRL_TEST_THREADS=2 $(BIN)/python -m pytest -m 'not slow'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/mkdocs build --strict

demo: install
	$(BIN)/flowrl demo

# Whether every trainer still learns on the embedded pipeline as in recorded demos, up to a quarter of an hour each:
# `make converge TRAINERS=ac_flow` for one of them.
TRAINERS ?= adjoint_matching vgg_flow ac_flow diffusion_nft tafs_grpo
converge: install
	set -e; for trainer in $(TRAINERS); do \
		$(BIN)/flowrl demo --trainer $$trainer --check --output_dir flowrl-demo/$$trainer --disable_tqdm true; \
	done

# The table of the embedded base model: guidance scales and samplers.
table: install
	$(BIN)/python benchmarks/base_table.py --out docs/tables/base_model.md --sheet docs/images/base_grid.png

# What an update costs beside the calls that its equations need: about five minutes of one idle core.
bench: install
	$(BIN)/python benchmarks/overhead.py --out docs/tables/overhead.md --json benchmarks/results/overhead.json

# All methods compared, in about a day of one core; stopped, it goes on where it was. `STUDY='--only AC-Flow --seeds 0'`
# runs a part, `--jobs 2` two runs at a time; `--plan` says what is missing.
study: install
	$(BIN)/python benchmarks/study.py $(STUDY)

# One method of each trainer, in minutes, into study-quick/.
study-quick: install
	$(BIN)/python benchmarks/study.py --quick --folder study-quick/runs --results study-quick/study.json --page study-quick/study.md

clean:
	rm -rf .venv build dist site flowrl-demo study-quick
