"""SmoothQuant's factors: how much of a channel's range moves from activations into weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", https://arxiv.org/abs/2211.10438.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 1e-5
"""Floor of magnitudes: a channel that never fires, or is never read, gets a finite factor."""


def smoothing_factors(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s = max|X|^alpha / max|W|^(1 - alpha), rounded to a power of two (the paper's eq. 4).

    Args:
        inputs: float32 [K], the largest |x| of each input channel.
        weights: float32 [K], the largest |w| of each, over all layers that read the input.
        alpha: 0 leaves the activations as they are, 1 makes their channels alike.

    Returns:
        float32 [K]; 1 for channels that never fire.
    """
    fired = inputs > 0
    inputs, weights = inputs.clamp_min(SMALLEST), weights.clamp_min(SMALLEST)
    factors = inputs**alpha / weights ** (1 - alpha)
    return torch.where(fired, torch.exp2(torch.round(torch.log2(factors))), 1.0)


@dataclass(frozen=True)
class Sharing:
    """Which channels of a layer's input are one channel of what makes it.

    With grouped-query attention o reads each channel of v once for every query head of its group:
    o's K = heads * sharers * width channels are [heads, sharers, width], v's are [heads, width].

    Attributes:
        sharers: heads that share a head.
        width: channels of a head.
    """

    sharers: int
    width: int

    def largest(self, values: Tensor) -> Tensor:
        """max over sharers: [K] to [K / sharers]."""
        return values.view(-1, self.sharers, self.width).amax(1).flatten()

    def mean(self, values: Tensor) -> Tensor:
        """Geometric mean over sharers: [K] to [K / sharers]."""
        return values.view(-1, self.sharers, self.width).log().mean(1).exp().flatten()

    def spread(self, values: Tensor) -> Tensor:
        """Each head's values for all its sharers: [K / sharers] to [K]."""
        heads = values.view(-1, 1, self.width)
        return heads.expand(-1, self.sharers, -1).flatten()


def smooth_weight(weight: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> Tensor:
    """W[n, k] * s[k] / r[n]: what reads X / s and makes Y / r; exact for powers of two.

    Args:
        weight: float [N, K].
        inputs: float32 [K], s; None for ones.
        outputs: float32 [n], r of the last n rows, the others' is 1; None for ones everywhere.

    Returns:
        [N, K], of the weight's dtype except that float16, whose range may be too small for exact
        results, becomes float32.
    """
    if weight.dtype is torch.float16:
        weight = weight.float()
    if inputs is not None:
        weight = weight * inputs.to(weight)
    if outputs is not None:
        first = len(weight) - len(outputs)
        last = weight[first:] / outputs.to(weight)[:, None]
        weight = torch.cat([weight[:first], last])
    return weight
