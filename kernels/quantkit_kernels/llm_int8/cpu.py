"""CPU: outlier columns found, quantised as zeros, and multiplied in float32 by themselves.

The other channels take the way of any int8 rows. A batch without outliers costs only the search.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.act_quant import PER_TOKEN, RowCode
from quantkit_kernels.act_quant import cpu as rows_cpu
from quantkit_kernels.act_quant.source import Source
from quantkit_kernels.code_types import CodeType
from quantkit_kernels.llm_int8.reference import ROWS
from quantkit_kernels.scaled_mm import cpu as scaled_cpu


def linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor | None,
    outliers: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    threshold: float,
    in_features: int,
    out_features: int,
) -> Tensor:
    """y = x_O W_O^T + (sx Q(x_rest)) W_rest^T + bias + residual, summed in float32.

    Args:
        x: [M, K]. codes, scales, sums: as packed by `scaled_mm.cpu`.

    Returns:
        [M, N] in the dtype of `x`.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, out_features)
    x = x.contiguous()
    columns = find_outliers(x, threshold) if outliers is None else outliers.long()
    weight, added = (codes, scales, sums), (bias, residual)
    if columns.numel() == 0:
        return _multiply(x, *weight, *added, out_features, x.dtype)
    rest = x.index_fill(1, columns, 0)
    y = _multiply(rest, *weight, *added, out_features, torch.float32)
    return y.add_(outlier_product(x, codes, scales, columns)[:, :out_features]).to(x.dtype)


def _multiply(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    sums: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """(sx Q(x)) W^T + bias + residual, in `dtype`."""
    width = x.shape[1]
    rows = rows_cpu.quantise(Source("x", x, width), ROWS, None, None)
    kinds: tuple[CodeType, RowCode, int] = ("int", "int8", PER_TOKEN)
    tensors = (codes, scales, sums, None, bias, residual)
    return scaled_cpu.linear(rows, *tensors, *kinds, width, width, out_features, dtype)


def find_outliers(x: Tensor, threshold: float) -> Tensor:
    """int64 [any]: the channels of x [M, K], M at least 1, with a value beyond the threshold."""
    # NaN is beyond, as in `outlier_mask`: maxima pass it on, and no comparison with it is true.
    return (~(x.abs().amax(0) <= threshold)).nonzero().flatten()


def outlier_product(x: Tensor, codes: Tensor, scales: Tensor, columns: Tensor) -> Tensor:
    """x[:, columns] W[:, columns]^T, float32 [M, N'], with W in panels of 32 output columns.

    Channel 2 i + h of a word of four is its byte i + 2 h.
    """
    channel = columns % 4
    place = 8 * (channel // 2 + channel % 2 * 2)
    words = codes.index_select(1, columns // 4)  # [N' / 32, O, 32]
    words.bitwise_left_shift_((24 - place)[:, None].int()).bitwise_right_shift_(24)
    y = x.index_select(1, columns).float() @ words.float()  # [N' / 32, M, 32]
    return y.mul_(scales).transpose(0, 1).reshape(x.shape[0], -1)
