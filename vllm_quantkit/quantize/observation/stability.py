"""How far the two halves of a calibration set disagree about the scales they would give.

Each half alone sets scales as the whole set does. Where those differ much, so would the scales of
another choice of samples: the layer needs more of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkit_kernels.act_quant.rows import LARGEST_CODE
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.quantize.methods.smoothquant import SMALLEST
from vllm_quantkit.quantize.observation.statistics import Ranges
from vllm_quantkit.quantize.recipes.recipe import LayerRecipe
from vllm_quantkit.spec import ActivationSpec

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""The scale of a layer whose inputs are 0: its reciprocal is finite."""

USUAL_ALPHA = 0.5
"""SmoothQuant's exponent where the search has not chosen one yet."""

QUANTILE = 0.95
"""Of the channels' disagreements: the few that hardly fire always differ."""


UNSTABLE = math.log(1.1)
"""Beyond it a layer counts as unstable: scales a tenth apart.

With windows of 256 tokens of the demo model's text, drawn with three seeds, so many of its layers
are beyond it:

    windows             16     64    256
    static             18 %    7 %    4 %
    awq, gptq, mse     67 %   25 %    4 %
    smoothquant 0.5   100 %   50 %   21 %

SmoothQuant's scales come from single largest values, which settle last.
"""

STATIC_REFUSED = math.log(1.5)
"""Beyond it a static activation scale is refused: another half of such text would be clipped at two
thirds of its range. No layer of the demo model comes near, even with 16 windows (0.26)."""


class UnstableScales(QuantkitError):  # noqa: N818 - named as the field says it
    """The halves of the calibration set give scales too far apart to be used."""


def static_input_scale(ranges: Ranges, activation: ActivationSpec) -> tuple[Tensor, Tensor | None]:
    """scale = max|x| / largest code, or (high - low) / 255 with zero = round(-128 - low / scale).

    Args:
        ranges: of the layer's inputs.
        activation: static, per tensor; asymmetric ones are widened to hold 0.

    Returns:
        float32 [1], and the zero-point among -128 .. 127 as float32 [1], None where symmetric.

    Raises:
        QuantkitError: the inputs were not finite, or there were none.
    """
    low, high = ranges.low.min().clamp_max(0), ranges.high.max().clamp_min(0)
    if not ranges.tokens or not bool(torch.isfinite(high - low)):
        raise QuantkitError(
            f"the layer's inputs range from {float(low):.4g} to {float(high):.4g} over "
            f"{ranges.tokens} calibration tokens, and no static scale covers that: use dynamic "
            f"activations."
        )
    if activation.symmetric:
        largest = torch.maximum(high, -low) / LARGEST_CODE[activation.code]
        return largest.float().clamp_min(SMALLEST_SCALE).view(1), None
    scale = ((high - low) / 255).float().clamp_min(SMALLEST_SCALE).view(1)
    # + 0.0 makes -0.0 positive, as the kernels' dynamic zero-points are.
    return scale, torch.round(-128 - low.float() * scale.reciprocal()).clamp(-128, 127) + 0.0


def scale_disagreement(halves: tuple[Ranges, Ranges], recipe: LayerRecipe) -> float | None:
    """How far apart the scales are that each half of the calibration set gives.

    The largest of those that the recipe sets from calibration:

        static activations     ln(s / min(s_1, s_2)),           s of both halves, s_h of one
        smoothquant            q95_k |ln(a_1[k] / a_2[k])| alpha,  a = max|x|
        awq, gptq, mse         q95_k |ln(m_1[k] / m_2[k])|,        m = mean|x|

    AWQ's channel scales are a power of m that is at most 1, so theirs is an upper bound. What gptq
    and mse weigh errors by, the mean of x^2, is not kept for each half: m stands for its root.

    Args:
        halves: the layer's inputs in each half; one may have seen no token.
        recipe: how the layer is quantised; `alpha` None counts as SmoothQuant's usual 0.5.

    Returns:
        0 where the halves agree, ln 2 where one gives twice the other's scale; None where
        calibration sets no scale, or no half saw a token.
    """
    if not any(half.tokens for half in halves):
        return None
    found = []
    if recipe.activation is not None and not recipe.activation.dynamic:
        found.append(_static_disagreement(halves, recipe.activation))
    if recipe.transform == "smoothquant":
        alpha = USUAL_ALPHA if recipe.alpha is None else recipe.alpha
        found.append(alpha * _log_ratio(halves[0].absmax, halves[1].absmax))
    if recipe.transform == "awq" or recipe.rounding in ("gptq", "mse"):
        found.append(_log_ratio(halves[0].mean_abs, halves[1].mean_abs))
    return max(found, default=None)


def is_unstable(disagreement: float | None) -> bool:
    """True where the halves' scales are further apart than `UNSTABLE`."""
    return disagreement is not None and disagreement > UNSTABLE


def refuse_unstable_static(
    layer: str, halves: tuple[Ranges, Ranges], activation: ActivationSpec | None
) -> None:
    """Refuses static activation scales that the halves do not agree on.

    Raises:
        UnstableScales: names the layer, both scales and what to do.
    """
    if activation is None or activation.dynamic:
        return
    apart = _static_disagreement(halves, activation)
    if apart > STATIC_REFUSED:
        first, second = (_half_scale(half, activation) for half in halves)
        raise UnstableScales(
            f"{layer}: the halves of the calibration set give static activation scales of "
            f"{first:.4g} and {second:.4g}, of which the smaller would have to grow by "
            f"{math.expm1(apart):.0%} to cover both (at most {math.expm1(STATIC_REFUSED):.0%} is "
            f"accepted): give more samples (--samples), or use dynamic activations."
        )


def _static_disagreement(halves: tuple[Ranges, Ranges], activation: ActivationSpec) -> float:
    """ln(s / min(s_1, s_2)): a half that saw nothing gives next to no scale."""
    least = min(_half_scale(half, activation) for half in halves)
    return math.log(_half_scale(_joined(*halves), activation) / least)


def _half_scale(ranges: Ranges, activation: ActivationSpec) -> float:
    if not ranges.tokens:
        return SMALLEST / LARGEST_CODE[activation.code]
    return max(float(static_input_scale(ranges, activation)[0]), SMALLEST / 255)


def _joined(first: Ranges, second: Ranges) -> Ranges:
    """The ranges over both; only the extremes matter here."""
    low, high = torch.minimum(first.low, second.low), torch.maximum(first.high, second.high)
    return Ranges(first.mean_abs, low, high, first.tokens + second.tokens)


def _log_ratio(first: Tensor, second: Tensor) -> float:
    """q95_k |ln(first[k] / second[k])|; magnitudes have a floor, so none is infinite."""
    ratios = (first.clamp_min(SMALLEST).log() - second.clamp_min(SMALLEST).log()).abs()
    ordered = ratios.double().sort().values
    return float(ordered[math.ceil(QUANTILE * (len(ordered) - 1))])
