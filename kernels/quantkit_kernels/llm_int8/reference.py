"""The oracle: y = x_O W_O^T + (sx Q(x_rest)) W_rest^T + b in fp32, from the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.act_quant import RowQuantizer, reference_quantize
from quantkit_kernels.wna16 import QuantizedWeight

ROWS = RowQuantizer("int8")
"""How the channels that are no outliers are quantised: symmetric, one scale per token."""


def reference_llm_int8(
    x: Tensor,
    weight: QuantizedWeight,
    threshold: float,
    outliers: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Outlier channels in full precision, the others in int8 (arXiv 2208.07339).

    Args:
        x: float [..., K].
        weight: N x K, 8 bits.
        threshold: a channel is an outlier where any |x[m, k]| exceeds it.
        outliers: int32 [any], distinct, the outlier channels instead.
        bias: float [N] or None.
        residual: float [..., N] or None.

    Returns:
        float32 [..., N], whatever the dtype of `x`.
    """
    values = x.float().reshape(-1, x.shape[-1])
    mask = outlier_mask(values, threshold, outliers)
    rest = reference_quantize(values.masked_fill(mask, 0), ROWS).dequantize()
    y = (values.masked_fill(~mask, 0) + rest) @ weight.dequantize().T
    y = y.reshape(*x.shape[:-1], y.shape[1])
    for added in (bias, residual):
        y = y if added is None else y + added.float()
    return y


def outlier_mask(x: Tensor, threshold: float, outliers: Tensor | None) -> Tensor:
    """bool [K]: the given channels, or those of x [M, K] with a value beyond the threshold.

    A NaN is beyond: its token becomes NaN, and the channel's other values keep their precision.
    """
    if outliers is None:
        return (~(x.abs() <= threshold)).any(0)
    mask = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    return mask.index_fill(0, outliers.long(), True)
