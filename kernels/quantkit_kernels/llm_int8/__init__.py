"""LLM.int8: outlier channels in 16 bits, the others in int8 (arXiv 2208.07339)."""

from quantkit_kernels.llm_int8.op import LlmInt8Weight, llm_int8_linear, pack_llm_int8
from quantkit_kernels.llm_int8.reference import reference_llm_int8

__all__ = ["LlmInt8Weight", "llm_int8_linear", "pack_llm_int8", "reference_llm_int8"]
