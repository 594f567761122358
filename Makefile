# make demo: environment + the training notebook on the embedded default.  make test: environment + tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := notebook,tracking,lora,ray,slurm,dev
# Linux without an NVIDIA GPU: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PIP_INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX),)
NOTEBOOK := notebooks/train.ipynb
OUT := out.ipynb
BENCH ?=

.PHONY: help setup demo test bare check bench evidence lab record clean

help:
	@echo "make demo    environment, then the training notebook on the embedded default (-> out.ipynb, out.html)"
	@echo "make test    environment, then every test but those marked slow, gpu or evidence"
	@echo "make bare    the notebooks and charts as on a machine without a browser and with an empty home"
	@echo "make check   format, lint, types, layers, recorded notebooks"
	@echo "make bench   training speed against TRL on this machine (about 25 minutes on two cores); BENCH=options"
	@echo "make evidence  hours: 50 kills, 1 GiB of pairs, 2,000 steps (docs/faults.md)"
	@echo "make lab     JupyterLab in notebooks/"
	@echo "make record  render the notebooks again that tests compare with"

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) .ci/preflight.py
	@echo "setup: installing the packages into $(VENV), 1 to 4 minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check $(PIP_INDEX) -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

setup: $(VENV)/.ready
	$(BIN)/python -m dpo_kit.model.builtin

demo: setup
	$(BIN)/papermill --log-output $(NOTEBOOK) $(OUT)
	$(BIN)/jupyter nbconvert --log-level=ERROR --to html $(OUT)
	@echo "the rendered run: $(OUT) and $(OUT:.ipynb=.html)"

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu and not evidence and not bare"
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg tests/notebooks

bare: $(VENV)/.ready
	.ci/bare $(BIN)/python -m pytest tests/test_bare.py tests/plots/test_picture.py tests/plots/test_charts.py tests/test_notebook.py tests/test_notebooks.py

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/pip install -q --disable-pip-version-check $(PIP_INDEX) -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/bench.py $(BENCH)

evidence: setup
	DPO_KIT_KILLS=50 $(BIN)/python -m pytest -s tests/supervise/test_kills.py > docs/evidence/kills.log
	DPO_KIT_SLOPE_STEPS=2000 $(BIN)/python -m pytest -s tests/engine/test_memory_slope.py > docs/evidence/memory_slope.log
	$(BIN)/python benchmarks/build_memory.py --gib 1 -o docs/evidence/build_memory.md

lab: setup
	$(BIN)/jupyter lab --notebook-dir=.

record: setup
	$(BIN)/python -m tests.record_notebooks

clean:
	rm -rf $(VENV) runs out.ipynb out.html
