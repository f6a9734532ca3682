"""Activations quantised for the linear layer that follows: alone, after a norm, after SiLU."""

from quantkit_kernels.act_quant.op import (
    add_rms_norm_quantize,
    quantize_rows,
    rms_norm_quantize,
    silu_mul_quantize,
)
from quantkit_kernels.act_quant.reference import (
    reference_add,
    reference_quantize,
    reference_rms_norm,
    reference_silu_mul,
)
from quantkit_kernels.act_quant.rows import (
    PER_TENSOR,
    PER_TOKEN,
    RowCode,
    RowLayout,
    RowQuantizer,
    Rows,
    join_rows,
    split_rows,
    sum_codes,
)

__all__ = [
    "PER_TENSOR",
    "PER_TOKEN",
    "RowCode",
    "RowLayout",
    "RowQuantizer",
    "Rows",
    "add_rms_norm_quantize",
    "join_rows",
    "quantize_rows",
    "reference_add",
    "reference_quantize",
    "reference_rms_norm",
    "reference_silu_mul",
    "rms_norm_quantize",
    "silu_mul_quantize",
    "split_rows",
    "sum_codes",
]
