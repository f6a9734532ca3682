"""Attention over keys and values of 4 bits."""

from quantkit_kernels.kv_int4.checks import check_treatment_values
from quantkit_kernels.kv_int4.layout import CacheLayout, Planes
from quantkit_kernels.kv_int4.op import attend, gather, prefill, write
from quantkit_kernels.kv_int4.rotation import (
    head_rotation,
    rotate_keys,
    rotate_queries,
    rotate_values,
    shift_products,
    unrotate,
)
from quantkit_kernels.kv_int4.treatment import Batch, KeyTreatment, Softmax

__all__ = [
    "Batch",
    "CacheLayout",
    "KeyTreatment",
    "Planes",
    "Softmax",
    "attend",
    "check_treatment_values",
    "gather",
    "head_rotation",
    "prefill",
    "rotate_keys",
    "rotate_queries",
    "rotate_values",
    "shift_products",
    "unrotate",
    "write",
]
