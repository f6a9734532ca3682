"""A linear layer that holds its weight quantised and passes gradients through."""

from __future__ import annotations

from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from quantkit_kernels.packing import pack_stream, unpack_stream
from quantkit_kernels.wna16 import QuantizedWeight


class FrozenLinear(nn.Linear):
    """y = x W^T + b, and dL/dx = dL/dy W; W has no gradient and is never kept dense.

    W is dequantised to the dtype of its input whenever it is multiplied, forward and backward. It
    is an `nn.Linear` so that `peft` wraps it; https://arxiv.org/abs/2305.14314 trains that way.

    Attributes:
        in_features: K.
        out_features: N.
        bits: of a code.
        code_type: what a code stands for.
        codes: int32 [N, words], codes packed without gaps.
        scale_bits: int32 [N, G], the bits of float32 scales.
        zeros: uint8 [N, G], as in `QuantizedWeight`.
        group_index: int32 [K], as in `QuantizedWeight`.
        bias: float [N] or None, frozen.
    """

    codes: Tensor
    scale_bits: Tensor
    zeros: Tensor
    group_index: Tensor
    _nothing: Tensor

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        """`dtype` is that of the adapters that `peft` adds."""
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.out_features, self.in_features = weight.codes.shape
        self.bits, self.code_type = weight.bits, weight.code_type
        self.register_buffer("codes", pack_stream(weight.codes, weight.bits))
        # A module's `to(dtype)` would round scales that it sees as floats.
        self.register_buffer("scale_bits", weight.scales.contiguous().view(torch.int32))
        self.register_buffer("zeros", weight.zeros)
        self.register_buffer("group_index", weight.group_index)
        self.register_buffer("_nothing", torch.tensor(nan, dtype=dtype), persistent=False)
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """NaN [N, K] in a single element of memory: tells shape, dtype and device, holds no value.

        `peft` asks for these. Merging an adapter into it fails: a sum cannot be stored there, and
        a merged copy has no number in it.
        """
        return self._nothing.expand(self.out_features, self.in_features)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W as [N, K] in `dtype`."""
        weight = QuantizedWeight(
            codes=unpack_stream(self.codes, self.bits, self.in_features),
            scales=self.scale_bits.view(torch.float32),
            zeros=self.zeros,
            group_index=self.group_index,
            bits=self.bits,
            code_type=self.code_type,
        )
        return weight.dequantize().to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """y = x W^T + b, [..., K] to [..., N], in the dtype of x."""
        y: Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x W^T, remembering the layer instead of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_y,) = grads
        return grad_y @ ctx.layer.dequantize(grad_y.dtype), None
