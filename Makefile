# Everything a fresh clone needs. `make help` lists the targets; each one brings its own set-up.
#   make train SPARSITY=0.95 ARGS="-p dataset mnist -p epochs 5"     other parameters of nbs/train.ipynb
#   make test PYTEST="-k masks"                                      only some of the tests in tests/
#   make browser PYTEST="-k slider"                                  only some of those in a browser
#   make claims PAPERS="nbs/papers/rigl.ipynb nbs/papers/snip.ipynb"  only some of the papers
#   make setup PYTHON=/path/to/python3.12                            another interpreter (3.11 or newer)

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup train test browser bare slow lab bench claims

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.sparselab-is-set-up
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v "$$p"; break; }; done)
PIP = $(BIN)/python -m pip install -qq --no-warn-conflicts -c constraints.txt

SPARSITY ?= 0.99
OUT ?= runs/train-$(SPARSITY).ipynb
ARGS ?=
PYTEST ?=
PAPERS ?= $(wildcard nbs/papers/*.ipynb)
# one more than two cores: some tests wait for kernels and processes, meanwhile another runs
WORKERS ?= 3
# the library notebooks; matplotlib draws their figures: a browser for each notebook takes longer than the rest of it, and tests/ has those with one
# and nothing is measured while all cores are busy
LESSONS = BROWSER_PATH=none SPARSELAB_CACHE= $(BIN)/nbdev_test --n_workers $(WORKERS) --file_re '^[0-9]' --skip_folder_re '^([_.]|bench$$|papers$$)'
# papermill that prints what a notebook prints, as it is printed
PAPERMILL = $(BIN)/python nbs/run.py
# JupyterLab refuses root, who in a container is the only user, unless told that this is meant
AS_ROOT = $(if $(filter 0,$(shell id -u)),--allow-root)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## create .venv with the pinned versions and auto_LiRPA (redone when settings.ini, setup.py or constraints.txt change)
	@echo "$(VENV) is up to date"

$(STAMP): settings.ini setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found. Install one, or name it: make setup PYTHON=/path/to/python3.12"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or newer. Name one that is: make setup PYTHON=/path/to/python3.12"; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot create virtual environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@echo "[1/5] $(VENV) with $$($(BIN)/python --version)"
	@$(PIP) pip setuptools
	@echo "[2/5] PyTorch"
	@$(PIP) torch
	@echo "[3/5] Jupyter, plotly, papermill, nbdev, pytest and the rest of constraints.txt"
	@$(PIP) -e '.[lab,hub,text,fast,onnx,ray,slurm,search,dev,lirpa]'
	@echo "[4/5] auto_LiRPA, without the torch<1.13 that it asks for (README.md says why)"
	@$(PIP) --no-deps auto_LiRPA
	@echo "[5/5] check"
	@$(BIN)/python -c "import sparselab, torch; print(f'sparselab {sparselab.__version__}, torch {torch.__version__}: ready in $(VENV)')"
	@touch $@

train: $(STAMP) ## train a 99 % sparse network under a verified loss on scikit-learn's digits
	@mkdir -p runs
	@touch runs/.started
	@echo "papermill nbs/train.ipynb $(OUT) -p sparsity $(SPARSITY) $(ARGS)"
	@$(PAPERMILL) nbs/train.ipynb "$(OUT)" -p sparsity $(SPARSITY) $(ARGS)
	@echo "executed notebook: $(OUT)"
	@found=$$(find runs -name summary.json -newer runs/.started); \
		for summary in $${found:-$$(ls -t runs/*/summary.json 2>/dev/null | head -n 1)}; do echo "run folder:        $$(dirname "$$summary")"; done

# Bytecode is written also where that is switched off, as in containers: every process would compile the library, every worker rewrite the tests.
test: export OMP_NUM_THREADS := 1
test: export PYTHONDONTWRITEBYTECODE :=
test: $(STAMP) ## all tests but those of `make browser`, `make bare` and `make slow`: library in sync, notebooks clean, ruff, every library notebook, pytest
	@$(BIN)/python tests/gates.py
	@$(BIN)/python -m ruff check --output-format concise
	@echo "library notebooks"
	@$(LESSONS)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST)

# Apart from the others: what a test waits for on a page comes later on a machine that computes.
browser: export OMP_NUM_THREADS := 1
browser: export PYTHONDONTWRITEBYTECODE :=
browser: $(STAMP) ## the tests in Chrome or Chromium, which click through the workbench; skipped where there is none
	@$(BIN)/python -m pytest -m 'browser and not slow' -n 2 --dist loadfile --no-loadscope-reorder $$(grep -l mark.browser tests/test_*.py) $(PYTEST)

bare: $(STAMP) ## the tests of a machine without Chrome and without Debian's data packages, which are hidden from them
	@$(BIN)/python -m pytest -m bare -n 2 --dist load tests/test_bare.py $(PYTEST)

slow: export OMP_NUM_THREADS := 1
slow: export PYTHONDONTWRITEBYTECODE :=
slow: $(STAMP) ## what takes minutes: comparisons in lessons over several seeds, and the tests that are marked slow
	@$(LESSONS) --flags slow
	@$(BIN)/python -m pytest -m slow $(PYTEST)

lab: $(STAMP) ## JupyterLab on the workbench
	@$(BIN)/python -m jupyterlab $(AS_ROOT) --ServerApp.root_dir="$(CURDIR)" --ServerApp.jpserver_extensions=sparselab.server=True $(firstword $(wildcard nbs/explore.ipynb) nbs) $(ARGS)

bench: $(STAMP) ## run nbs/bench/*.ipynb; the executed notebooks go to runs/bench/
	@mkdir -p runs/bench
	@set -e; for notebook in $(wildcard nbs/bench/*.ipynb); do echo "papermill $$notebook"; \
		$(PAPERMILL) "$$notebook" "runs/bench/$$(basename "$$notebook")" $(ARGS); done

# Two notebooks at a time, each on half of the cores: while one begins, draws or ends, the other trains. What they print stands in runs/papers/*.log.
claims: export OMP_NUM_THREADS := 1
claims: $(STAMP) ## run nbs/papers/*.ipynb at small scale, into runs/papers/, and write their records and README's table
	@mkdir -p runs/papers
	@one() { name="runs/papers/$$(basename "$$1" .ipynb)"; echo "papermill $$1"; \
		if $(PAPERMILL) "$$1" "$$name.ipynb" -p scale small $(ARGS) > "$$name.log" 2>&1; then echo "done: $$1"; \
		else cat "$$name.log"; echo "failed: $$1"; return 1; fi; }; export -f one; \
		cores=$$($(BIN)/python -c "import joblib; print(joblib.cpu_count())"); export LOKY_MAX_CPU_COUNT=$$((cores > 1 ? cores / 2 : 1)); \
		printf '%s\n' $(PAPERS) | xargs -P $$((cores > 1 ? 2 : 1)) -I{} bash -c 'one {}'
	@$(BIN)/python nbs/papers/table.py
