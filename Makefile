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
MLX := .venv-mlx
MLX_STAMP := $(MLX)/.installed
SEED ?= 1
# Test files at a time; each runs by itself (`make test JOBS=0`: one after another, in one process).
# In the order of their names: by the number of tests, the few long ones would be left for the end.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-threads parity llamacpp lm-eval golden bench-train bench-decode bench-scale \
	align docs docs-check bench-long bench-wikisql bench-serve bench-large gpu-check gpu-inputs gpu-wheels gpu-compile lint types dist install clean
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

# Exported GGUF files in llama.cpp, beside jlora (docs/fidelity.md).
llamacpp: $(STAMP) $(LLAMACPP_STAMP)
	$(BIN)/python -m parity.llamacpp --seed $(SEED)

# lm-evaluation-harness against `jlora serve`, its sums beside the plain model's (docs/serve.md).
lm-eval: $(STAMP) $(LM_EVAL_STAMP)
	$(BIN)/python -m parity.lm_eval $(ARGS)

# The reference results that `make test` compares with; made again only when a golden case changes.
golden: $(PARITY_STAMP)
	$(PARITY)/bin/python -m parity.golden

# Speed and memory beside PEFT, transformers and microsoft/LoRA, whose code is cloned into
# runs/benchmarks/LoRA if it takes part; ARGS goes to the command (docs/benchmarks.md).
bench-train: $(STAMP) $(PARITY_STAMP)
	$(BIN)/python -m benchmarks.train_step $(ARGS)

bench-decode: $(STAMP) $(PARITY_STAMP)
	$(BIN)/python -m benchmarks.decode $(ARGS)

bench-scale: $(STAMP) $(PARITY_STAMP)
	$(BIN)/python -m benchmarks.scale $(ARGS)

# Many steps of one model: does time or memory grow, and how long do five epochs of E2E take?
bench-long: $(STAMP)
	$(BIN)/python -m benchmarks.long_run $(ARGS)

# mlx-lm's LoRA example beside mlx-lm and PEFT (docs/results.md).
bench-wikisql: $(STAMP) $(PARITY_STAMP) $(MLX_STAMP)
	$(BIN)/python -m benchmarks.wikisql $(ARGS)

# LoRA on a model of the shape of Llama 2 7B; makes 13.5 GB of weights the first time.
bench-large: $(STAMP)
	$(BIN)/python -m benchmarks.large $(ARGS)

# `jlora serve` beside llama.cpp's server, mlx-lm's and PEFT (docs/serve.md); ARGS=--quick: 11
# minutes, behind ARGS=--prepare, which makes models and adapters.
bench-serve: $(STAMP) $(PARITY_STAMP) $(MLX_STAMP) $(LLAMACPP_STAMP)
	$(BIN)/python -m benchmarks.serve $(ARGS)

# The check of an NVIDIA card (docs/gpu.md). For a card without a network: what its machine needs for
# Python GPU_PYTHON, and batches and prompts, are gathered in runs/gpu beforehand.
GPU_PYTHON ?= 3.12
gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

gpu-inputs: $(STAMP)
	$(BIN)/python -m benchmarks.gpu --prepare

gpu-wheels: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_wheels runs/gpu/wheels --python $(GPU_PYTHON)

# The CUDA operators for three kinds of cards by NVIDIA's compiler from PyPI; no card is needed.
gpu-compile: $(STAMP)
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet --disable-pip-version-check \
	  'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' \
	  'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*' 'nvidia-cublas==13.1.*' \
	  'nvidia-curand==10.4.0.*'
	PYTHONPATH=$$(echo .venv-cuda/lib/python*/site-packages) \
	  $(BIN)/python -m benchmarks.gpu_compile 80 89 90

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
	@$(BIN)/python -c 'from jlora.system.runtime import jt' >/dev/null 2>&1 & \
	  $(PIP) -e '.[dev]' $(JITTOR:%=jittor==%); code=$$?; wait; exit $$code
	@touch $@

$(PARITY_STAMP): parity/requirements.txt
	@test -x $(PARITY)/bin/python || $(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(LLAMACPP_STAMP): parity/llamacpp-requirements.txt
	@test -x $(LLAMACPP)/bin/python || $(PYTHON) -m venv $(LLAMACPP)
	$(LLAMACPP)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(LM_EVAL_STAMP): parity/lm-eval-requirements.txt
	@test -x $(LM_EVAL)/bin/python || $(PYTHON) -m venv $(LM_EVAL)
	$(LM_EVAL)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(MLX_STAMP): benchmarks/mlx-requirements.txt
	@test -x $(MLX)/bin/python || $(PYTHON) -m venv $(MLX)
	$(MLX)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

clean:
	rm -rf $(VENV) .venv-jittor-* $(PARITY) $(LLAMACPP) $(LM_EVAL) $(MLX) .venv-dist build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache .mypy_cache
	find jlora tests -name __pycache__ -type d -prune -exec rm -rf {} +
