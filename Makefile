# demo and test set up everything they need; a second call does not install again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo smoke test test-slow lint bench findings sweep clean

demo: $(STAMP)
	$(BIN)/python train.py experiment=demo

# Every stage in miniature, each from the last, and one chat turn: does all of it run here?
smoke: $(STAMP)
	PYTHON=$(BIN)/python tests/smoke.sh

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)
	$(BIN)/python benchmarks/substitution.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python -m pytest -m slow tests/memory/test_storage.py
	$(BIN)/python benchmarks/ingest.py
	$(BIN)/python benchmarks/focus.py
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/causal.py
	$(BIN)/python benchmarks/runtime.py

# Surprises of real libraries: each script installs pinned packages in a folder of its own, and fails if they changed.
findings:
	@failed=0; for script in findings/*.sh; do echo "== $$script"; "$$script" || failed=1; done; exit $$failed

sweep: $(STAMP)
	$(BIN)/python train.py -m experiment=demo seed=0,1,2

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch first and by itself, so that nothing else can pull in another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@
