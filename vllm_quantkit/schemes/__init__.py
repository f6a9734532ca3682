"""Quantisation methods and the products that serve their layers."""

from vllm_quantkit.schemes.base import LinearScheme, Method
from vllm_quantkit.schemes.registry import SCHEMES, get_method

__all__ = ["SCHEMES", "LinearScheme", "Method", "get_method"]
