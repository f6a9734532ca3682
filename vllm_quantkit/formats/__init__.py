"""Checkpoint dialects: one file each, found through `get_format`."""

from importlib import import_module
from typing import cast

from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.formats.base import CheckpointTensor, Format, Role

FORMATS = {
    "awq": "vllm_quantkit.formats.awq",
    "gptq": "vllm_quantkit.formats.gptq",
    "gptq_v2": "vllm_quantkit.formats.gptq",
    "compressed-tensors": "vllm_quantkit.formats.compressed_tensors",
    "fp8": "vllm_quantkit.formats.fp8",
    "fbgemm_fp8": "vllm_quantkit.formats.fbgemm_fp8",
    "bitsandbytes": "vllm_quantkit.formats.bitsandbytes",
    "quantkit": "vllm_quantkit.formats.quantkit",
    "16-bit": "vllm_quantkit.formats.sixteen_bit",
}
"""Dialect to module. All but `16-bit` are a checkpoint's `quant_method`."""


def get_format(quant_method: str) -> Format:
    """The dialect module for a checkpoint's `quant_method`.

    Raises:
        UnsupportedScheme: no such dialect.
    """
    if quant_method not in FORMATS:
        served = ", ".join(sorted(name for name in FORMATS if name != "16-bit"))
        raise UnsupportedScheme(
            f"quant_method {quant_method!r} is not served by quantkit; it serves "
            f"{served}. Drop --quantization to let vLLM try the checkpoint."
        )
    return cast(Format, import_module(FORMATS[quant_method]))


__all__ = ["FORMATS", "CheckpointTensor", "Format", "Role", "get_format"]
