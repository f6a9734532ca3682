"""The exponent of SmoothQuant's factors, by the output error that a layer's numerics leave.

Xiao et al., https://arxiv.org/abs/2211.10438, choose one exponent for a whole model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit_kernels.act_quant.reference import reference_quantize
from vllm_quantkit.quantize.methods.rounding import nearest, search_rows
from vllm_quantkit.quantize.methods.smoothquant import Sharing, smoothing_factors
from vllm_quantkit.quantize.observation.observing import row_quantizer
from vllm_quantkit.quantize.observation.stability import static_input_scale
from vllm_quantkit.quantize.observation.statistics import InputStats, Ranges
from vllm_quantkit.quantize.recipes.recipe import LayerRecipe
from vllm_quantkit.spec import ActivationSpec

ALPHAS = tuple(step / 20 for step in range(21))
"""Exponents the search tries; factors are powers of two, so finer steps change few of them."""

SEARCHED_ROWS = 512
"""Rows, of all layers that read the input, on which the search measures errors."""

CLIPPED_ROWS = 192
"""Rows on which it does where ranges are clipped, which takes so much longer."""

SEARCHED_INPUTS = 256
"""Inputs, of those that were kept, on which it does."""


def smoothing_scales(
    absmax: Tensor, weights: Sequence[Tensor], sharing: Sharing, alpha: float
) -> Tensor:
    """SmoothQuant's factors for every input channel, equal for all that share a source.

    Args:
        absmax: float32 [K], the largest |x| of each channel.
        weights: float [N_i, K] of the layers that read the input.
        sharing: of the input channels.
        alpha: 0 to 1.

    Returns:
        float32 [K], powers of two.
    """
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).float()
    factors = smoothing_factors(sharing.largest(absmax), sharing.largest(columns), alpha)
    return sharing.spread(factors)


def search_smoothing_scales(
    stats: InputStats, weights: Sequence[Tensor], recipe: LayerRecipe, sharing: Sharing
) -> tuple[Tensor, float | None]:
    """The `smoothing_scales` of least |X W^T - Q(X / s) Q(s W)^T| on the inputs that were kept.

    Q rounds to the recipe's weight and activation numerics; ranges of weights are clipped by the
    activity of channels where the recipe will.

    Args:
        stats: of the input; some inputs were kept.
        weights: as in `smoothing_scales`.
        recipe: the numerics.
        sharing: of the input channels.

    Returns:
        the scales and alpha; ones and None where no alpha is better than that.
    """
    inputs = stats.sample[:: -(-len(stats.sample) // SEARCHED_INPUTS)]
    clip = recipe.rounding != "nearest"
    rows = search_rows(weights, recipe.weight, CLIPPED_ROWS if clip else SEARCHED_ROWS)
    activity = inputs.square().mean(0)
    wanted = [inputs @ weight.T for weight in rows]

    def error(scales: Tensor) -> float:
        read = inputs / scales
        if recipe.activation is not None:
            read = served_inputs(read, recipe.activation, scaled_ranges(stats.ranges, scales))
        scaled = activity / scales.square() if clip else None
        made = (read @ nearest(weight * scales, recipe.weight, scaled).T for weight in rows)
        return sum(float((a - b).square().sum()) for a, b in zip(made, wanted, strict=True))

    best, chosen = torch.ones_like(stats.ranges.mean_abs), None
    least = error(best)
    for alpha in ALPHAS:
        scales = smoothing_scales(stats.ranges.absmax, weights, sharing, alpha)
        found = error(scales)
        if found < least:
            best, chosen, least = scales, alpha, found
    return best, chosen


def served_inputs(inputs: Tensor, activation: ActivationSpec, ranges: Ranges) -> Tensor:
    """float32 [M, K]: the inputs as codes that a serving engine makes of them.

    Args:
        inputs: float32 [M, K].
        activation: the numerics.
        ranges: of the inputs over the calibration set; static scales cover them.
    """
    if activation.outlier_threshold is not None:
        outliers = inputs.abs().amax(0) > activation.outlier_threshold
        usual = inputs.masked_fill(outliers, 0)
        codes = reference_quantize(usual, row_quantizer(activation))
        return torch.where(outliers, inputs, codes.dequantize())
    scale, zero = None, None
    if not activation.dynamic:
        scale, zero = static_input_scale(ranges, activation)
    return reference_quantize(inputs, row_quantizer(activation), scale, zero).dequantize()


def scaled_ranges(ranges: Ranges, scales: Tensor) -> Ranges:
    """The ranges of x / s."""
    return Ranges(
        ranges.mean_abs / scales, ranges.low / scales, ranges.high / scales, ranges.tokens
    )
