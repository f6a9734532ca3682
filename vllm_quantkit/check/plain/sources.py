"""vLLM's files and releases that the rules speak of."""

from __future__ import annotations

from vllm_quantkit.check.release import Release

QUANTIZATION = "vllm/model_executor/layers/quantization"
LINEAR = "vllm/model_executor/kernels/linear"
COMPRESSED = f"{QUANTIZATION}/compressed_tensors/compressed_tensors.py"
GPTQ = f"{QUANTIZATION}/auto_gptq.py"
AWQ = f"{QUANTIZATION}/auto_awq.py"

OLD, ORDERLESS, NEW = Release(0, 27), Release(0, 30), Release(0, 32)
"""The older release read; the one from which no activation order is served; the newer one read."""

MARLIN_GROUPS = (-1, 32, 64, 128)
HALF = ("float16", "bfloat16")
