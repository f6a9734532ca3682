"""Linear layers with 2- to 8-bit weights and 16-bit activations."""

from quantkit_kernels.wna16.op import pack_weight, wna16_linear
from quantkit_kernels.wna16.reference import reference_linear
from quantkit_kernels.wna16.weights import (
    PackedWeight,
    QuantizedWeight,
    UniformWeight,
    make_uniform,
)

__all__ = [
    "PackedWeight",
    "QuantizedWeight",
    "UniformWeight",
    "make_uniform",
    "pack_weight",
    "reference_linear",
    "wna16_linear",
]
