"""Quantisation methods: one file each, found by the name a user gives to `--quantization`."""

from importlib import import_module
from typing import cast

from vllm_quantkit.schemes.base import Method

SCHEMES = {
    "quantkit": "vllm_quantkit.schemes.auto:Auto",
    "quantkit-awq": "vllm_quantkit.schemes.awq:AWQ",
    "quantkit-gptq": "vllm_quantkit.schemes.gptq:GPTQ",
    "quantkit-fp8": "vllm_quantkit.schemes.fp8:FP8",
    "quantkit-fp8-block": "vllm_quantkit.schemes.fp8_block:FP8Block",
    "quantkit-smoothquant": "vllm_quantkit.schemes.smoothquant:SmoothQuant",
    "quantkit-int8": "vllm_quantkit.schemes.int8:Int8",
    "quantkit-int4": "vllm_quantkit.schemes.int4:Int4",
    "quantkit-llm-int8": "vllm_quantkit.schemes.llm_int8:LLMInt8",
    "quantkit-kv4": "vllm_quantkit.schemes.kv4:KV4",
}
"""Registered name to `module:class`."""


def get_method(name: str) -> type[Method]:
    """The class registered under `name`; imported when first needed."""
    module, _, attribute = SCHEMES[name].partition(":")
    return cast(type[Method], getattr(import_module(module), attribute))
