PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
QUICK := tests/capture tests/test_batches.py tests/test_data.py tests/test_direct.py tests/test_exactness.py \
	tests/test_reading.py tests/test_rooms.py tests/test_sampling_runs.py tests/test_storage.py

.PHONY: help install demo pictures test check test-architectures test-transformers weights architectures docs lint format bench bench-gpu peers kvpress clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-19s %s\n", $$1, $$2}'

install: $(INSTALLED) ## Install the package and its tools into .venv

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,gguf,report]'
	touch $@

demo: $(INSTALLED) ## Capture the demo model on the demo text, without a hub, and draw it
	HF_HUB_OFFLINE=1 $(BIN)/qk-sniffer predict --config configs/demo.yaml
	$(BIN)/qk-sniffer report data/demo

pictures: demo ## Draw the README's pictures anew
	cp data/demo/report/positional-r2-queries.png docs/assets/demo-positional-r2.png
	cp data/demo/report/components-1q.png docs/assets/demo-components.png

test: lint ## Run lint and all tests
	$(BIN)/pytest -n 3 --dist worksteal

check: lint ## Run lint and the quick tests, at every save
	$(BIN)/pytest -n 2 --dist worksteal $(QUICK)

test-architectures: $(INSTALLED) ## Examine every causal language model of transformers
	$(BIN)/pytest -m '' tests/test_architectures.py tests/test_company.py tests/test_sharing.py
	$(BIN)/pytest -m every_architecture tests/test_estimate.py tests/test_continuations.py

test-transformers: ## Examine a dozen with another release, as in RELEASE=5.2.0
	mkdir -p .cache
	grep -Ev '^(transformers|huggingface_hub)==' constraints.txt > .cache/constraints-$(RELEASE).txt
	$(PYTHON) -m venv .cache/transformers-$(RELEASE)
	.cache/transformers-$(RELEASE)/bin/pip install --quiet --disable-pip-version-check \
		-c .cache/constraints-$(RELEASE).txt -e '.[dev]' transformers==$(RELEASE)
	.cache/transformers-$(RELEASE)/bin/python -m pytest tests/test_architectures.py tests/test_models.py

architectures: $(INSTALLED) ## Write docs/architectures.md anew
	$(BIN)/python tests/examine.py
	$(BIN)/python tests/sharing.py

docs: $(INSTALLED) ## Write the reference anew and build the documentation into site/
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

weights: $(INSTALLED) ## Bring SmolLM2-135M to .cache, for tests with real weights
	$(BIN)/python tests/smollm2.py

lint: $(INSTALLED) ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED) ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(INSTALLED) ## Measure speed and memory, or a part as in ONLY=host; saves .cache/bench.md
	TQDM_DISABLE=1 PYTHONPATH=tests $(BIN)/python -m bench $(if $(ONLY),--only $(ONLY))

bench-gpu: $(INSTALLED) ## Measure the capture on a GPU, in six minutes
	TQDM_DISABLE=1 PYTHONUNBUFFERED=1 PYTHONPATH=tests $(BIN)/python -m bench --only gpu --repetitions 1

peers: $(INSTALLED) ## Compare sniff with nnsight and TransformerLens; writes docs/peers.md
	mkdir -p .cache
	grep -E '^(torch|numpy)==' constraints.txt > .cache/constraints-peers.txt
	$(PYTHON) -m venv .cache/peers
	.cache/peers/bin/pip install --quiet --disable-pip-version-check \
		-c .cache/constraints-peers.txt nnsight transformer_lens
	HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python -m peers .cache/peers/bin/python

kvpress: $(INSTALLED) ## Compress with kvpress by our statistics and by its own
	mkdir -p .cache
	grep -E '^(torch|numpy)==' constraints.txt > .cache/constraints-kvpress.txt
	$(PYTHON) -m venv .cache/kvpress
	.cache/kvpress/bin/pip install --quiet --disable-pip-version-check \
		-c .cache/constraints-kvpress.txt kvpress==0.5.5
	$(BIN)/pytest tests/test_export_kvpress.py

clean: ## Remove what the other targets made
	rm -rf .venv .cache data build dist site .pytest_cache .mypy_cache .ruff_cache
