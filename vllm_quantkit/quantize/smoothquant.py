"""SmoothQuant's factors: how much of a channel's range moves from activations into weights."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-5
"""Floor of magnitudes: a channel that never fires, or is never read, gets a finite factor."""


def smoothing_factors(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s = max|X|^alpha / max|W|^(1 - alpha), rounded to a power of two (arXiv 2211.10438, eq. 4).

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
