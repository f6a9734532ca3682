"""Scales of input channels that are folded into what makes them: y = (x / s) (s W)^T."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_quantkit.quantize.methods.awq import awq_scales, relative_magnitude, search_awq_scales
from vllm_quantkit.quantize.methods.rtn import is_finite
from vllm_quantkit.quantize.methods.smoothing_search import (
    scaled_ranges,
    search_smoothing_scales,
    smoothing_scales,
)
from vllm_quantkit.quantize.methods.smoothquant import Sharing
from vllm_quantkit.quantize.model.model_map import SourceKind
from vllm_quantkit.quantize.observation.stability import USUAL_ALPHA
from vllm_quantkit.quantize.observation.statistics import InputStats
from vllm_quantkit.quantize.recipes.recipe import LayerRecipe


@dataclass(frozen=True)
class ChannelScales:
    """Scales of a stage's input channels.

    Attributes:
        scales: float32 [K], positive and finite; equal for channels that share a source.
        alpha: the exponent that made them; None where they are ones.
        note: sentences about what was not as planned; empty where all was.
    """

    scales: Tensor
    alpha: float | None
    note: str = ""


def channel_scales(
    weights: Sequence[Tensor], stats: InputStats, recipe: LayerRecipe, sharing: Sharing
) -> ChannelScales:
    """The recipe's transform of the layers that read one input; ones where it brings nothing.

    Args:
        weights: float [N_i, K], finite.
        stats: of the input.
        recipe: its transform, alpha and numerics.
        sharing: of the input channels.
    """
    ones, ranges = torch.ones_like(stats.ranges.mean_abs), stats.ranges
    if recipe.transform == "none":
        return ChannelScales(ones, None)
    if not is_finite(torch.stack([ranges.mean_abs, ranges.low, ranges.high])):
        return ChannelScales(
            ones, None, "Channels were not scaled: calibration activations had NaN or infinity."
        )
    if recipe.transform == "awq":
        found = _awq(weights, stats, recipe, sharing)
    else:
        found = _smoothquant(weights, stats, recipe, sharing)
    return ChannelScales(ones, None) if found.alpha is None else found


def scaled_stats(stats: InputStats, scales: Tensor) -> InputStats:
    """The statistics of x / s: the Hessian becomes diag(1 / s) H diag(1 / s).

    Args:
        stats: of x.
        scales: float32 [K], s.
    """
    first, second = (scaled_ranges(half, scales) for half in stats.halves)
    hessian = stats.hessian
    return InputStats(
        ranges=scaled_ranges(stats.ranges, scales),
        halves=(first, second),
        hessian=None if hessian is None else hessian / scales / scales[:, None],
        sample=stats.sample / scales,
    )


@torch.no_grad()
def fold(
    source: nn.Module,
    kind: SourceKind,
    readers: Sequence[Tensor],
    scales: Tensor,
    sharing: Sharing,
    *,
    dtype: torch.dtype,
) -> None:
    """Divides what makes x by s and multiplies what reads x by s: the same function.

    What is stored in 16 bits is rounded here, and the readers of a norm take the scale that its
    rounded weight has. A channel whose norm weight would round to 0 or overflow keeps it.

    Args:
        source: has a `weight`, [K] of a norm or [M, ...] of a linear layer whose last K / sharers
            rows make x, and may have a `bias`; changed in place.
        kind: of the source.
        readers: float [N, K], all that read x; changed in place.
        scales: float32 [K], positive, equal for all sharers.
        sharing: which channels of x are one channel of the source.
        dtype: what the checkpoint stores norms and biases in.
    """
    weight, bias = source.get_parameter("weight"), getattr(source, "bias", None)
    divisors = sharing.largest(scales)
    if kind == "linear":
        weight[-len(divisors) :] /= divisors[:, None].to(weight.dtype)
    else:
        divisors = _fold_into_norm(weight, divisors, 1.0 if kind == "norm_plus_one" else 0.0, dtype)
    if isinstance(bias, Tensor):
        last = bias[-len(divisors) :]
        last.copy_((last.float() / divisors).to(dtype))
    for reader in readers:
        reader.mul_(sharing.spread(divisors).to(reader.dtype))


def _fold_into_norm(weight: Tensor, divisors: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """offset + w becomes (offset + w) / s, w rounded to `dtype`; returns the s that this made."""
    gain = weight.double() + offset
    stored = (gain / divisors - offset).to(dtype)
    divided = stored.double() + offset
    dead, usable = gain == 0, torch.isfinite(divided) & (divided * gain > 0)
    weight.copy_(torch.where(usable, stored, weight.to(dtype)))
    made = torch.where(usable, gain / divided, 1.0)
    return torch.where(dead, divisors, made).float()


def _awq(
    weights: Sequence[Tensor], stats: InputStats, recipe: LayerRecipe, sharing: Sharing
) -> ChannelScales:
    mean_abs, hessian, spec = stats.ranges.mean_abs, stats.hessian, recipe.weight
    if recipe.alpha is not None:
        magnitude = relative_magnitude(weights, spec)
        return ChannelScales(awq_scales(mean_abs, magnitude, sharing, recipe.alpha), recipe.alpha)
    if hessian is not None and is_finite(hessian):
        clip = recipe.rounding != "nearest"
        found = search_awq_scales(mean_abs, hessian, weights, spec, sharing, clip=clip)
        return ChannelScales(*found)
    magnitude = relative_magnitude(weights, spec)
    return ChannelScales(
        awq_scales(mean_abs, magnitude, sharing, USUAL_ALPHA),
        USUAL_ALPHA,
        f"Alpha is {USUAL_ALPHA}, not searched: there is no finite second moment of the inputs.",
    )


def _smoothquant(
    weights: Sequence[Tensor], stats: InputStats, recipe: LayerRecipe, sharing: Sharing
) -> ChannelScales:
    absmax, alpha, note = stats.ranges.absmax, recipe.alpha, ""
    if alpha is None and len(stats.sample):
        return ChannelScales(*search_smoothing_scales(stats, weights, recipe, sharing))
    if alpha is None:
        alpha = USUAL_ALPHA
        note = f"Alpha is {alpha}, not searched: no inputs were kept to measure errors on."
    return ChannelScales(smoothing_scales(absmax, weights, sharing, alpha), alpha, note)
