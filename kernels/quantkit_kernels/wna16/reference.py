"""The oracle: y = x W^T + b in fp32, straight from the definition of the weight."""

from torch import Tensor

from quantkit_kernels.wna16.weights import QuantizedWeight


def reference_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """y[m, n] = sum_k x[m, k] scales[n, g(k)] value(codes[n, k]) + bias[n].

    Args:
        x: float [..., K].
        weight: N x K weight.
        bias: float [N] or None.

    Returns:
        float32 [..., N], whatever the dtype of `x`.
    """
    y = x.float() @ weight.dequantize().T
    return y if bias is None else y + bias.float()
