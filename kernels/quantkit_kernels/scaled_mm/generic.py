"""Any device: codes row-major, both sides dequantised in fp32, multiplied by ATen. Not fast."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.act_quant.rows import RowCode, RowQuantizer, split_rows
from quantkit_kernels.code_types import FLOAT8_DTYPES, CodeType
from quantkit_kernels.scaled_mm.names import GENERIC_NAME
from quantkit_kernels.scaled_mm.weights import (
    INT8_ZERO,
    ScaledWeight,
    column_zeros,
    group_size_of,
    row_quantizer,
    rows_for,
)
from quantkit_kernels.wna16.weights import QuantizedWeight


def pack(weight: QuantizedWeight, quantizer: RowQuantizer, dtype: torch.dtype) -> ScaledWeight:
    """Codes uint8 [N, K] and scales float32 [N, G] as they are; no sums."""
    zeros = column_zeros(weight)
    return ScaledWeight(
        codes=weight.codes,
        scales=weight.scales.float(),
        sums=None,
        zeros=zeros,
        code_type=weight.code_type,
        quantizer=rows_for(quantizer, weight.codes.shape[1], zeros),
        group_size=group_size_of(weight),
        in_features=weight.codes.shape[1],
        out_features=weight.codes.shape[0],
        kernel=GENERIC_NAME,
    )


def linear(
    rows: Tensor,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    code_type: CodeType,
    row_code: RowCode,
    row_group: int,
    group_size: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """y = x W^T + bias + residual, all dequantised, in fp32.

    Args:
        rows: uint8 [M, stride]. Others as packed by `pack`.
        dtype: of the result.

    Returns:
        [M, N] in `dtype`.
    """
    quantizer = row_quantizer(row_code, row_group, in_features, zeros is not None)
    x = split_rows(rows, quantizer, in_features).dequantize()
    if code_type == "int":
        values = codes.float() - INT8_ZERO - (0 if zeros is None else zeros[:, None])
    else:
        values = codes.view(FLOAT8_DTYPES[code_type]).float()
    spread = scales.repeat_interleave(group_size, dim=1)[:, :in_features]
    y = x @ (values * spread).T
    for added in (bias, residual):
        y = y if added is None else y + added.float()
    return y.to(dtype)
