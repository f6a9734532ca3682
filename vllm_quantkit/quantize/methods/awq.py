"""AWQ: scale the input channels that matter up before rounding.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
https://arxiv.org/abs/2306.00978. Its second part, clipping the ranges of groups by output error, is
`rtn` with a Hessian.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_quantkit.quantize.methods.rounding import nearest, output_error, search_rows
from vllm_quantkit.quantize.methods.rtn import BLOCK_VALUES, group_width, split_groups
from vllm_quantkit.quantize.methods.smoothquant import Sharing
from vllm_quantkit.spec import WeightSpec

ALPHAS = tuple(step / 20 for step in range(21))
"""Exponents the search tries: from weights alone (0) to activations alone (1)."""

SMALLEST = 1e-4
"""Floor of channel magnitudes, so that a channel that never fires gets a finite scale."""

SEARCHED_ROWS = 1024
"""Rows, of all layers that read the input, on which the search measures errors."""

CLIPPED_ROWS = 192
"""Rows on which it does where ranges are clipped, which takes so much longer."""


def awq_scales(mean_abs: Tensor, magnitude: Tensor, sharing: Sharing, alpha: float) -> Tensor:
    """s = a^alpha / w^(1 - alpha), a geometric mean over channels that share a source.

    Args:
        mean_abs: float32 [K], a, the mean |x| of each channel.
        magnitude: float32 [K], w, see `relative_magnitude`.
        sharing: of the input channels.
        alpha: 0 to 1.

    Returns:
        float32 [K], positive, equal for all sharers; sqrt(max * min) is 1.
    """
    scales = mean_abs.clamp_min(SMALLEST) ** alpha / magnitude.clamp_min(SMALLEST) ** (1 - alpha)
    scales = sharing.spread(sharing.mean(scales))
    return scales / (scales.max() * scales.min()).sqrt()


def search_awq_scales(
    mean_abs: Tensor,
    hessian: Tensor,
    weights: Sequence[Tensor],
    spec: WeightSpec,
    sharing: Sharing,
    *,
    clip: bool = False,
) -> tuple[Tensor, float | None]:
    """The `awq_scales` whose alpha gives the least sum_k H_kk |E_k|^2, E = W - nearest(W s) / s.

    Errors of rounding have no sign that they prefer, so that the rest of tr(E H E^T) averages out
    over rows: the diagonal finds an alpha whose error is within 1 % of the least, K times faster.
    All of H decides whether the scales are better than none.

    Args:
        mean_abs: float32 [K], mean |x|.
        hessian: float32 [K, K], mean of x x^T.
        weights: float [N_i, K] of the layers that read the input.
        spec: the numerics.
        sharing: of the input channels.
        clip: True where ranges will be clipped to the least output error.

    Returns:
        the scales and alpha; ones and None where no alpha is better than that.
    """
    magnitude = relative_magnitude(weights, spec)
    rows = search_rows(weights, spec, CLIPPED_ROWS if clip else SEARCHED_ROWS)
    trial = _Trial(rows, hessian, spec, clip)
    candidates = {alpha: awq_scales(mean_abs, magnitude, sharing, alpha) for alpha in ALPHAS}
    chosen = min(ALPHAS, key=lambda alpha: trial.diagonal_error(candidates[alpha]))
    ones = torch.ones_like(mean_abs)
    if trial.output_error(candidates[chosen]) < trial.output_error(ones):
        return candidates[chosen], chosen
    return ones, None


def relative_magnitude(weights: Sequence[Tensor], spec: WeightSpec) -> Tensor:
    """Mean over the rows of all weights of |w| / max |w| of its group: float32 [K]."""
    in_features, rows = weights[0].shape[1], sum(map(len, weights))
    width = group_width(spec, in_features)
    total = weights[0].new_zeros(in_features, dtype=torch.float32)
    for part in _in_cache(weights):
        groups = split_groups(part.float().abs(), width)
        largest = groups.amax(-1, keepdim=True).clamp_min(torch.finfo(groups.dtype).tiny)
        total += groups.div_(largest).sum(0).flatten()[:in_features]
    return total / rows


@dataclass(frozen=True)
class _Trial:
    """Errors that scales leave, E = W - nearest(W s) / s.

    Attributes:
        weights: float32 [N_i, K].
        hessian: float32 [K, K].
        spec: the numerics.
        clip: as in `search_awq_scales`.
    """

    weights: Sequence[Tensor]
    hessian: Tensor
    spec: WeightSpec
    clip: bool

    def diagonal_error(self, scales: Tensor) -> float:
        """sum_k H_kk |E_k|^2 over all weights."""
        squared = torch.zeros_like(scales)
        for part in _in_cache(self.weights) if self.spec.scale_rows == 1 else self.weights:
            squared += self._error(part, scales).square_().sum(0)
        return float(squared @ self.hessian.diagonal())

    def output_error(self, scales: Tensor) -> float:
        """sum_W tr(E H E^T)."""
        return sum(
            float(output_error(self._error(weight, scales), self.hessian))
            for weight in self.weights
        )

    def _error(self, weight: Tensor, scales: Tensor) -> Tensor:
        scaled = weight * scales
        activity = self.hessian.diagonal() / scales.square() if self.clip else None
        return (scaled - nearest(scaled, self.spec, activity)).div_(scales)


def _in_cache(weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """The weights, so many rows at a time that temporaries stay in cache."""
    rows = max(1, BLOCK_VALUES // weights[0].shape[1])
    return (part for weight in weights for part in weight.split(rows))
