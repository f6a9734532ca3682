"""AWQ: scale the input channels that matter up before rounding, and clip the ranges of groups.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
https://arxiv.org/abs/2306.00978. The search measures errors through the inputs' second moment,
|X E^T|^2 = tokens * tr(E H E^T), so it sees every calibration token at the price of none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.quantize.calibration import InputStats
from vllm_quantkit.quantize.rtn import finite_weight, group_width, rtn, split_groups
from vllm_quantkit.spec import WeightSpec

ALPHAS = tuple(step / 20 for step in range(20))
"""Exponents the search tries; from weights alone (0) to almost activations alone."""

SMALLEST = 1e-4
"""Floor of channel magnitudes, so that a channel that never fires gets a finite scale."""


def awq(
    weight: Tensor,
    stats: InputStats,
    spec: WeightSpec,
    *,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedWeight:
    """Rounds to nearest after clipping each group's range to the least output error.

    Args:
        weight: float [N, K], already multiplied by `awq_scales` and the inputs divided by them.
        stats: moments of the layer's (divided) inputs.
        spec: the numerics.
        scale_dtype: as in `rtn`.

    Raises:
        QuantkitError: as `rtn`.
    """
    return rtn(weight, spec, clip=True, hessian=stats.hessian, scale_dtype=scale_dtype)


def awq_scales(
    weights: Sequence[Tensor],
    stats: InputStats,
    spec: WeightSpec,
    *,
    repeats: int = 1,
    width: int = 1,
) -> Tensor:
    """The s = a^alpha / w^(1 - alpha) of least sum_W tr(E H E^T), E = W - rtn(W s) / s.

    a is the channel's mean |x|, w its mean weight relative to its group's largest. s = 1 is tried
    too, so the result is never worse than rounding to nearest.

    Args:
        weights: float [N_i, K] of the layers that read the same input.
        stats: moments of that input.
        spec: the numerics.
        repeats: r heads in a row read the same channels (grouped-query attention) and must share
            their scales.
        width: channels of such a head.

    Returns:
        float32 [K], positive.
    """
    weights = [finite_weight(weight) for weight in weights]
    activation = stats.mean_abs.clamp_min(SMALLEST)
    magnitude = _relative_magnitude(torch.cat(weights), spec).clamp_min(SMALLEST)
    best = torch.ones_like(activation)
    least = _output_error(weights, best, stats.hessian, spec)
    for alpha in ALPHAS:
        scales = activation**alpha / magnitude ** (1 - alpha)
        scales = share_over_heads(scales, repeats, width)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = _output_error(weights, scales, stats.hessian, spec)
        if error < least:
            best, least = scales, error
    return best


def share_over_heads(scales: Tensor, repeats: int, width: int) -> Tensor:
    """[K] with each run of `repeats` heads of `width` channels replaced by its geometric mean."""
    heads = scales.view(-1, repeats, width).log()
    return heads.mean(1, keepdim=True).expand_as(heads).exp().flatten()


@torch.no_grad()
def fold(
    previous: nn.Module,
    weights: Sequence[Tensor],
    scales: Tensor,
    *,
    dtype: torch.dtype,
    repeats: int = 1,
    width: int = 1,
) -> None:
    """Divides the previous output by s and multiplies the weights by s: the same function.

    What will be stored in 16 bits is rounded here, and the weights take the rounded scale.

    Args:
        previous: a norm (weight [C]) or a linear layer (weight [C, ...]), changed in place.
        weights: float [N, K] of the layers that read it, changed in place.
        scales: float32 [K], equal over repeated heads.
        dtype: what the checkpoint stores norms and biases in.
        repeats: as in `awq_scales`; C = K / repeats.
        width: as in `awq_scales`.
    """
    per_output = scales.view(-1, repeats, width)[:, 0].flatten()
    weight = previous.get_parameter("weight")
    if weight.dim() == 1:
        divided = (weight / per_output).to(dtype).to(weight.dtype)
        per_output = torch.where(divided == 0, per_output, weight / divided)
        scales = per_output
    else:
        divided = weight / per_output[:, None]
    weight.copy_(divided)
    if getattr(previous, "bias", None) is not None:
        bias = previous.get_parameter("bias")
        bias.copy_((bias / per_output).to(dtype))
    for consumer in weights:
        consumer.mul_(scales)


def _relative_magnitude(weight: Tensor, spec: WeightSpec) -> Tensor:
    """Mean over rows of |w| / max |w| of its group: [K]."""
    in_features = weight.shape[1]
    groups = split_groups(weight.abs(), group_width(spec, in_features))
    relative = groups / groups.amax(-1, keepdim=True).clamp_min(torch.finfo(groups.dtype).tiny)
    return relative.mean(0).flatten()[:in_features]


def _output_error(
    weights: Sequence[Tensor], scales: Tensor, hessian: Tensor, spec: WeightSpec
) -> Tensor:
    """sum_W tr(E H E^T), E = W - rtn(W s) / s."""
    errors = (weight - rtn(weight * scales, spec).dequantize() / scales for weight in weights)
    return torch.stack([((error @ hessian) * error).sum() for error in errors]).sum()
