"""Offline quantisers: tensors in, integer codes out, and the pipeline that writes checkpoints."""

from vllm_quantkit.quantize.awq import awq, awq_scales, fold
from vllm_quantkit.quantize.gptq import gptq
from vllm_quantkit.quantize.rtn import rtn

__all__ = ["awq", "awq_scales", "fold", "gptq", "rtn"]
