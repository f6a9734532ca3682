"""Offline quantisers: tensors in, integer codes out, and the pipeline that writes checkpoints."""

from vllm_quantkit.quantize.gptq import gptq
from vllm_quantkit.quantize.rtn import rtn

__all__ = ["gptq", "rtn"]
