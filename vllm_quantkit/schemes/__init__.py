"""Quantisation methods: one file each, found by the name a user gives to `--quantization`."""

from importlib import import_module
from typing import cast

from vllm_quantkit.schemes.base import LinearScheme, Method

SCHEMES = {
    "quantkit": "vllm_quantkit.schemes.auto:Auto",
    "quantkit-awq": "vllm_quantkit.schemes.awq:AWQ",
    "quantkit-gptq": "vllm_quantkit.schemes.gptq:GPTQ",
}
"""Registered name to `module:class`."""


def get_method(name: str) -> type[Method]:
    """The class registered under `name`; imported when first needed."""
    module, _, attribute = SCHEMES[name].partition(":")
    return cast(type[Method], getattr(import_module(module), attribute))


__all__ = ["SCHEMES", "LinearScheme", "Method", "get_method"]
