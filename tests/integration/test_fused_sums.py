"""Norms and activations quantise as the layer behind them asks, sums of codes included."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit_kernels.act_quant import (
    PER_TENSOR,
    RowQuantizer,
    quantize_rows,
    split_rows,
    sum_codes,
)
from vllm_quantkit.integration.blocks import Feed
from vllm_quantkit.integration.fusion import fuse

K = 80
SCALE = torch.tensor([0.05])

CASES = [
    (RowQuantizer("int8", sum_group=K), None),
    (RowQuantizer("int8", symmetric=False, sum_group=K), None),
    (RowQuantizer("int8", PER_TENSOR, sum_group=32), SCALE),
]


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(K).bfloat16()
        self.variance_epsilon = 1e-6


class SiluAndMul(nn.Module):
    pass


def fused(source: nn.Module, quantizer: RowQuantizer, scale: Tensor | None) -> Any:
    """The source, which now quantises for a layer that reads such rows."""
    linear = SimpleNamespace(quant_method=SimpleNamespace(quantizer=quantizer), input_scale=scale)
    feeds = [Feed(source, linear)]
    layers: Any = SimpleNamespace(
        norm_feeds=lambda: feeds if isinstance(source, RMSNorm) else [],
        activation_feeds=lambda: feeds if isinstance(source, SiluAndMul) else [],
    )
    assert fuse(layers) == 1
    return source._forward_method


def check(rows: Tensor, quantizer: RowQuantizer, scale: Tensor | None) -> None:
    """The layer could have made rows laid out like these, and their sums are right."""
    assert rows.shape == quantize_rows(torch.ones(3, K), quantizer, scale).shape
    parts = split_rows(rows, quantizer, K)
    assert parts.codes.any()
    assert torch.equal(parts.sums, sum_codes(parts.codes, quantizer.sum_group))


@pytest.mark.parametrize(("quantizer", "scale"), CASES)
def test_sums_come_with_the_rows(quantizer: RowQuantizer, scale: Tensor | None) -> None:
    x = torch.randn(3, K).bfloat16()
    norm = fused(RMSNorm(), quantizer, scale)
    check(norm(x), quantizer, scale)
    check(norm(x, torch.randn_like(x))[0], quantizer, scale)
    check(fused(SiluAndMul(), quantizer, scale)(torch.randn(3, 2 * K)), quantizer, scale)
