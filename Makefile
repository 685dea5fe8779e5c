# Pumice needs Python >= 3.10, pip and make; everything else is set up in .venv.
#
#   make demo    ask questions of the photographs in examples/
#   make test    all the tests
#   make test-busy   the same beside two busy loops, without a terminal, with SIGINT ignored
#   make attack  attack engine, server, files, trainings and disks for MINUTES (20), and print one table
#   make check   lint, formatting, types, layers
#   make clients   ask a server with fourteen real clients (needs node and npm for two of them)
#   make docs    the documentation as a site, in build/site
#   make notebooks   run the notebooks and keep their outputs
#   make tutorial   train the tutorial's example and ask for every row that it learned (minutes)
#   make fmt     rewrite the code as `make check` wants it
#   make clean   remove .venv, build and caches
#
# Variables: PYTHON (which Python makes .venv), TORCH_INDEX (where the CPU build of PyTorch is
# looked for on Linux when the default index does not have it), ARGS (more arguments for pytest, or for
# notebooks/run.py or tests/attack/run.py, or names of scripts in examples/clients), MINUTES of `make attack`.

PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=
MINUTES ?= 20

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TOO_OLD := Pumice needs Python >= 3.10; name a newer one: make PYTHON=python3.12

.PHONY: demo test test-busy attack check clients docs notebooks tutorial fmt clean

demo: .venv/.runtime
	@$(BIN)/python examples/demo.py

test: .venv/.dev build/transformers-4.37/.done
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

# What a test may not depend on: idle cores, a terminal, a parent that lets SIGINT through.
test-busy: .venv/.dev build/transformers-4.37/.done
	$(BIN)/python tests/busy.py $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

# Seeds are written down: ARGS="--seed 7" takes others, and the table says how to repeat what went wrong.
attack: .venv/.dev
	$(BIN)/python tests/attack/run.py --minutes $(MINUTES) $(ARGS)

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/python -m pytest -q tests/test_layers.py

clients: .venv/.dev build/clients/.done build/clients-inspect/.done build/clients-js/.done
	$(BIN)/python examples/clients/run.py $(ARGS)

build/clients/.done: examples/clients/requirements.txt examples/clients/no-deps.txt | $(BIN)/python
	@mkdir -p build
	$(BIN)/python -m venv build/clients
	build/clients/bin/python -m pip --disable-pip-version-check install -q -r examples/clients/requirements.txt
	build/clients/bin/python -m pip --disable-pip-version-check install -q --no-deps -r examples/clients/no-deps.txt
	@touch $@

build/clients-inspect/.done: examples/clients/requirements-inspect.txt | $(BIN)/python
	@mkdir -p build
	$(BIN)/python -m venv build/clients-inspect
	build/clients-inspect/bin/python -m pip --disable-pip-version-check install -q -r $<
	@touch $@

build/clients-js/.done: examples/clients/package.json
	@mkdir -p build/clients-js
	@cp examples/clients/package.json build/clients-js/
	cd build/clients-js && npm install --no-audit --no-fund --silent
	@touch $@

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python docs/site/check.py build/site

notebooks: .venv/.dev
	$(BIN)/python notebooks/run.py $(ARGS)

tutorial: .venv/.dev
	$(BIN)/python .ci/finetune.py

fmt: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "$(TOO_OLD)" or 0)'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# On Linux PyPI's torch brings gigabytes of CUDA libraries. Without an NVIDIA GPU the small CPU build
# is taken instead: from the default index if that has it, else from TORCH_INDEX. When neither
# answers, the next step installs whatever the default index offers.
.venv/.torch: constraints.txt | $(BIN)/python
	@version=$$(sed -n 's/^torch==//p' constraints.txt); \
	if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi > /dev/null; then \
		$(PIP) install --no-deps "torch==$$version+cpu" 2> /dev/null || \
		$(PIP) install --no-deps --retries 0 --timeout 15 --index-url $(TORCH_INDEX) "torch==$$version+cpu" || \
		echo "No CPU build of torch $$version at $(TORCH_INDEX): taking the default build."; \
	fi
	@touch $@

.venv/.runtime: pyproject.toml constraints.txt .venv/.torch
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

.venv/.dev: pyproject.toml constraints.txt .venv/.torch
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch .venv/.runtime $@

# What the original LLaVA opens tokenizers with: its `tokenizers` cannot stand in .venv beside ours. Small, as
# tokenizers need no torch. Where it cannot be installed, the test that wants it is skipped, and says so.
build/transformers-4.37/.done: | $(BIN)/python
	@mkdir -p build
	@{ $(BIN)/python -m venv build/transformers-4.37 && \
		build/transformers-4.37/bin/python -m pip --disable-pip-version-check install -q --retries 0 --timeout 15 \
			--only-binary :all: transformers==4.37.2 sentencepiece protobuf && touch $@; } || \
		{ rm -rf build/transformers-4.37; echo "transformers 4.37.2 cannot be installed: its test is skipped."; }

.venv/.docs: pyproject.toml constraints.txt .venv/.torch
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	@touch .venv/.runtime $@
