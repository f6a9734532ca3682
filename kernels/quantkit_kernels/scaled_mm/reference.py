"""The oracle: y = x W^T + b in fp32, straight from what rows and weight stand for."""

from __future__ import annotations

from torch import Tensor

from quantkit_kernels.act_quant.rows import RowQuantizer, split_rows
from quantkit_kernels.wna16.weights import QuantizedWeight


def reference_scaled_linear(
    rows: Tensor,
    weight: QuantizedWeight,
    quantizer: RowQuantizer,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y[m, n] = sum_k sx[m, gx(k)] (xq[m, k] - zx[m]) W[n, k] + bias[n] + residual[m, n].

    W is dequantised.

    Args:
        rows: uint8 [..., stride], as `quantizer` lays them out.
        weight: N x K weight.
        quantizer: how the rows are quantised.
        bias: float [N] or None.
        residual: float [..., N] or None.

    Returns:
        float32 [..., N].
    """
    flat = rows.reshape(-1, rows.shape[-1])
    x = split_rows(flat, quantizer, weight.codes.shape[1]).dequantize()
    y = x @ weight.dequantize().T
    y = y if bias is None else y + bias.float()
    y = y.reshape(*rows.shape[:-1], -1)
    return y if residual is None else y + residual.float()
