"""CPU: outlier columns found, quantised as zeros, and multiplied in float32 by themselves.

The other channels take the way of any int8 rows. A batch without outliers costs only the search.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.act_quant import PER_TOKEN
from quantkit_kernels.act_quant import cpu as rows_cpu
from quantkit_kernels.act_quant.source import Source
from quantkit_kernels.llm_int8.reference import ROWS
from quantkit_kernels.scaled_mm import cpu as scaled_cpu


def linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor | None,
    outliers: Tensor | None,
    bias: Tensor | None,
    threshold: float,
    in_features: int,
    out_features: int,
) -> Tensor:
    """y = x_O W_O^T + (sx Q(x_rest)) W_rest^T + bias, summed in float32.

    Args:
        x: [M, K]. codes, scales, sums: as packed by `scaled_mm.cpu`.

    Returns:
        [M, N] in the dtype of `x`.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, out_features)
    columns = find_outliers(x, threshold) if outliers is None else outliers.long()
    has_outliers = columns.numel() > 0
    rest = x.index_fill(1, columns, 0) if has_outliers else x
    rows = rows_cpu.quantise(Source("x", rest, in_features), ROWS, None, None)
    kinds, sizes = ("int", "int8", PER_TOKEN), (in_features, in_features, out_features)
    dtype = torch.float32 if has_outliers else x.dtype
    y = scaled_cpu.linear(rows, codes, scales, sums, bias, *kinds, *sizes, dtype)
    if not has_outliers:
        return y
    weight = gather_columns(codes, scales, columns)
    return y.add_(x.index_select(1, columns).float() @ weight[:, :out_features]).to(x.dtype)


def find_outliers(x: Tensor, threshold: float) -> Tensor:
    """int64 [any]: the channels of x [M, K], M at least 1, with a value beyond the threshold.

    A maximum passes NaN on; all comparisons with NaN are false.
    """
    return (~(x.abs().amax(0) <= threshold)).nonzero().flatten()


def gather_columns(codes: Tensor, scales: Tensor, columns: Tensor) -> Tensor:
    """W[:, columns]^T as float32 [O, N'], from panels of 32 columns.

    Channel 2 i + h of a word of four is its byte i + 2 h.
    """
    channel = columns % 4
    place = 8 * (channel // 2 + channel % 2 * 2)
    words = codes.index_select(1, columns // 4)  # [N' / 32, O, 32]
    signed = (words << (24 - place)[:, None].int()) >> 24
    values = signed.transpose(0, 1) * scales.transpose(0, 1)  # [O, N' / 32, 32]
    return values.reshape(len(columns), -1)
