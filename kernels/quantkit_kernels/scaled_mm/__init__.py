"""Linear layers with 8-bit weights and 8-bit activations, each with scales."""

from quantkit_kernels.scaled_mm.op import pack_scaled, scaled_linear
from quantkit_kernels.scaled_mm.reference import reference_scaled_linear
from quantkit_kernels.scaled_mm.weights import ScaledWeight

__all__ = ["ScaledWeight", "pack_scaled", "reference_scaled_linear", "scaled_linear"]
