# Everything a user or contributor runs. `make demo` and `make test` are the two to begin with.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
TEMPER := $(BIN)/temper
RUNS ?= runs

.PHONY: demo test setup check docs generated new perf clean

# Trains, calibrates, measures and red-teams refusal tokens on SmolLM2-135M-Instruct; writes runs/<id>/report.html.
demo: setup
	$(TEMPER) fetch smollm2-135m minilm
	$(TEMPER) run examples/demo.yaml --out $(RUNS) --report

# The whole suite; needs the two assets in the cache and no network after that.
test: setup
	$(TEMPER) fetch smollm2-135m minilm
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Torch first and alone: on Linux a later package must never choose its build.
setup: $(VENV)/.ready
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# Format, lint, types, architecture: about a minute.
check: setup
	$(BIN)/ruff format --check src tests examples docs perf conftest.py
	$(BIN)/ruff check src tests examples docs perf conftest.py
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/architecture

# Method pages, tables and help text come from the cards; `check` fails when they are stale.
generated: setup
	$(BIN)/python docs/generate.py

docs: setup generated
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# make new NAME=family/name
new: setup
	$(TEMPER) new $(NAME)

# Speed and memory beside the peers, all jobs or JOBS="ibp_step ..."; the table goes into perf/README.md.
perf: setup
	$(BIN)/python perf/run.py $(JOBS)

clean:
	rm -rf $(VENV) site build
