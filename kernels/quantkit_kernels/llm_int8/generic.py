"""Any device: codes row-major, everything dequantised in fp32, multiplied by ATen. Not fast."""

from __future__ import annotations

from torch import Tensor

from quantkit_kernels.act_quant import reference_quantize
from quantkit_kernels.llm_int8.reference import ROWS, outlier_mask
from quantkit_kernels.scaled_mm.weights import INT8_ZERO


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
    """y = x_O W_O^T + (sx Q(x_rest)) W_rest^T + bias + residual, in fp32.

    Args:
        x: [M, K]. codes, scales: as packed by `scaled_mm.generic`.

    Returns:
        [M, N] in the dtype of `x`.
    """
    mask = outlier_mask(x, threshold, outliers)
    rest = reference_quantize(x.masked_fill(mask, 0), ROWS).dequantize()
    values = x.float().masked_fill(~mask, 0) + rest
    y = values @ (scales * (codes.float() - INT8_ZERO)).T
    for added in (bias, residual):
        y = y if added is None else y + added.float()
    return y.to(x.dtype)
