"""Half-quadratic refinement of a grid: good for most weights, at the cost of a few outliers.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023),
https://mobiusml.github.io/hqq_blog/. It needs no data: it minimises ||W - Q||_p^p, p < 1, which
outliers cannot dominate, by alternating a shrinkage of the error with a new grid. The paper moves
real zero-points; kernels and checkpoints hold whole ones, so the scale is solved for as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORM = 0.7
"""p of the error's norm."""

ITERATIONS = 20
START_PENALTY = 10.0
"""beta of the first iteration, for errors in units of the scale."""

PENALTY_GROWTH = 1.01


def refine_grid(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """s, z <- least squares of W - e on q, e = shrink(W - s (q - z)), keeping the best seen.

    Args:
        groups: float32 [N, G, g].
        scales: float32 [N, G, 1], where to start.
        zeros: whole numbers as float32 [N, G, 1], where to start.
        bits: of a code.

    Returns:
        scales and zeros of the same kind, of no greater ||W - Q||_p^p than the start.
    """
    levels, penalty = 2**bits - 1, START_PENALTY
    best, least = (scales, zeros), torch.full_like(scales, torch.inf)
    for _ in range(ITERATIONS):
        codes = torch.round(groups / scales).add_(zeros).clamp_(0, levels)
        error = groups / scales - (codes - zeros)
        size = (error.abs().pow(NORM).sum(-1, keepdim=True)) * scales**NORM
        better = size < least
        best = torch.where(better, scales, best[0]), torch.where(better, zeros, best[1])
        least = torch.minimum(size, least)
        target = groups - scales * _shrink(error, penalty)
        scales, zeros = _fit(codes, target, scales, levels)
        penalty *= PENALTY_GROWTH
    return best


def _fit(codes: Tensor, target: Tensor, scales: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """z = round(mean(q - t / s)), then s = <t, q - z> / <q - z, q - z>; s stays positive."""
    zeros = (codes - target / scales).mean(-1, keepdim=True).round_().clamp_(0, levels)
    centred = codes - zeros
    fitted = (target * centred).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True)
    return torch.where(fitted > 0, fitted, scales), zeros


def _shrink(error: Tensor, penalty: float) -> Tensor:
    """sign(e) max(|e| - |e|^(p - 1) / beta, 0): the proximal step of the p-norm."""
    size = error.abs()
    threshold = size.clamp_min(torch.finfo(size.dtype).tiny).pow(NORM - 1) / penalty
    return error.sign() * (size - threshold).clamp_min_(0)
