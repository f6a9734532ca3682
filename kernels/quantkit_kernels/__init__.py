"""Kernels of vllm-quantkit: custom ops that know neither vLLM nor checkpoints."""
