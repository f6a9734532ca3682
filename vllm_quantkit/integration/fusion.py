"""Norms and activation functions that quantise for the linear layer behind them.

The seam is vLLM's `CustomOp._forward_method`, the bound method that a norm or an activation calls:
it is there in every vLLM served, with and without torch.compile. Ours returns quantised rows, one
uint8 tensor that passes through the model's code where the 16-bit activations did, and the linear
layer's own call takes them as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.act_quant import (
    RowQuantizer,
    add_rms_norm_quantize,
    rms_norm_quantize,
    silu_mul_quantize,
)
from vllm_quantkit.integration.blocks import DecoderLayers, Feed

NORMS = {"RMSNorm": 0.0, "GemmaRMSNorm": 1.0}
"""Class of a norm to what it adds to its weight."""

SILU = "SiluAndMul"


def fuse(layers: DecoderLayers) -> int:
    """Let every norm and SiLU that feeds a layer with 8-bit inputs quantise for it.

    Returns:
        how many do.
    """
    norms = [feed for feed in layers.norm_feeds() if _is_plain_norm(feed.source)]
    silus = [feed for feed in layers.activation_feeds() if type(feed.source).__name__ == SILU]
    fused = [_attach(feed, norm_and_quantize) for feed in norms]
    fused += [_attach(feed, silu_and_quantize) for feed in silus]
    return sum(fused)


def fused(layers: DecoderLayers) -> Iterator[Feed]:
    """The norms and SiLUs that quantise for the layer behind them."""
    for feed in (*layers.norm_feeds(), *layers.activation_feeds()):
        if hasattr(feed.source, "quantizes_for"):
            yield feed


def norm_and_quantize(
    self: Any, x: Tensor, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """rows = Q(norm(x [+ residual])), and the sum where there is a residual."""
    weight = self.weight
    if NORMS[type(self).__name__]:
        weight = weight.float() + NORMS[type(self).__name__]
    fused: QuantizesFor = self.quantizes_for
    static = fused.static()
    if residual is None:
        return rms_norm_quantize(x, weight, self.variance_epsilon, fused.quantizer, *static)
    return add_rms_norm_quantize(
        x, residual, weight, self.variance_epsilon, fused.quantizer, *static
    )


def silu_and_quantize(self: Any, x: Tensor) -> Tensor:
    """rows = Q(silu(x[:, :K]) * x[:, K:])."""
    fused: QuantizesFor = self.quantizes_for
    return silu_mul_quantize(x, fused.quantizer, *fused.static())


class QuantizesFor:
    """The linear layer that reads the rows.

    Attributes:
        quantizer: how it wants its input.
    """

    def __init__(self, linear: torch.nn.Module, quantizer: RowQuantizer) -> None:
        self.quantizer = quantizer
        # In a list, or the norm would own the linear layer as a submodule.
        self._linear = [linear]

    def static(self) -> tuple[Tensor | None, Tensor | None]:
        """The layer's static scale and zero-point, if it has them."""
        (linear,) = self._linear
        return getattr(linear, "input_scale", None), getattr(linear, "input_zero", None)


def _attach(feed: Feed, forward: Any) -> bool:
    """True where the layer takes quantised rows, and its source now makes them."""
    quantizer = getattr(feed.linear.quant_method, "quantizer", None)
    if quantizer is None:
        return False
    feed.source.quantizes_for = QuantizesFor(feed.linear, quantizer)
    feed.source._forward_method = MethodType(forward, feed.source)
    return True


def _is_plain_norm(norm: Any) -> bool:
    return (
        type(norm).__name__ in NORMS
        and getattr(norm, "variance_size_override", None) is None
        and getattr(norm, "has_weight", True)
    )
