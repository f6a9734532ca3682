"""Any device: the definitions in ATen. Correct, not fast."""

from __future__ import annotations

from torch import Tensor

from quantkit_kernels.act_quant.reference import (
    reference_add,
    reference_quantize,
    reference_rms_norm,
    reference_silu_mul,
)
from quantkit_kernels.act_quant.rows import RowQuantizer, join_rows
from quantkit_kernels.act_quant.source import Source


def quantise(
    source: Source, quantizer: RowQuantizer, scale: Tensor | None, zero: Tensor | None
) -> Tensor:
    """Rows of a source."""
    return join_rows(reference_quantize(_values(source), quantizer, scale, zero))


def _values(source: Source) -> Tensor:
    x = source.x
    if source.kind == "silu_mul":
        return reference_silu_mul(x)
    if source.residual is not None and source.total is not None:
        x = source.total.copy_(reference_add(x, source.residual))
    return x if source.weight is None else reference_rms_norm(x, source.weight, source.epsilon)
