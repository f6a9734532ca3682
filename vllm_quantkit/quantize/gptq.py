"""GPTQ: round one input channel at a time, and let the channels not yet rounded make up for it.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
https://arxiv.org/abs/2210.17323.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.quant_math import dequantize_codes, quantize_codes
from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.quantize.rtn import find_grid, finite_weight, group_width, in_channel_order
from vllm_quantkit.spec import WeightSpec

BLOCK_CHANNELS = 128
"""Channels rounded before their errors are carried over to all later ones."""

DAMPING_STEPS = 8
"""How often the damping grows tenfold before a Hessian is given up."""


def gptq(
    weight: Tensor,
    hessian: Tensor,
    spec: WeightSpec,
    *,
    damping: float = 0.01,
    clip: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedWeight:
    """Lowers tr(E H E^T), E = W - dequantise(codes), by feedback of each channel's rounding error.

    Args:
        weight: float [N, K].
        hessian: float [K, K], mean of x x^T over the layer's inputs x; any positive factor.
            A channel that never fires is rounded to nearest and disturbs no other.
        spec: the numerics; `act_order` rounds the most active channels first and groups channels
            in that order.
        damping: share of the mean diagonal that is added to the diagonal; grows tenfold for as
            long as the Hessian is not positive definite.
        clip: True takes each group's range of least squared error instead of the full one.
        scale_dtype: what the checkpoint stores scales in; codes are made for the rounded scale.

    Raises:
        QuantkitError: weight or Hessian is not finite, or no damping makes the Hessian positive
            definite.
    """
    weight = finite_weight(weight)
    in_features, width = weight.shape[1], group_width(spec, weight.shape[1])
    order = torch.arange(in_features, device=weight.device)
    if spec.act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    feedback = inverse_factor(hessian[order][:, order], damping).float()
    rest = weight[:, order]
    codes, grids = [], []
    for begin in range(0, in_features, width):
        end = min(begin + width, in_features)
        group = rest[:, None, begin:end]
        scales, zeros = find_grid(group, spec, clip=clip, scale_dtype=scale_dtype)
        grids.append((scales.squeeze(1), zeros.squeeze(1)))
        codes += _round_group(rest, feedback, (begin, end), *grids[-1], spec.bits)
    scales, zeros = (torch.cat(parts, dim=1) for parts in zip(*grids, strict=True))
    return in_channel_order(torch.cat(codes, dim=1), scales, zeros, order, spec)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U with U^T U = (H + d I)^-1, d = damping * mean(diag H).

    With J the reversal and L L^T = J (H + d I) J, U = J L^-1 J: one factorisation, no inverse.

    Args:
        hessian: float [K, K], symmetric.
        damping: grows tenfold until the Cholesky factorisation succeeds.

    Returns:
        float64 [K, K].

    Raises:
        QuantkitError: the Hessian is not finite, or stays indefinite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise QuantkitError(
            "the Hessian has NaN or infinite values, so the calibration activations overflowed: "
            "run calibration in float32, or check the model's weights."
        )
    flipped = hessian.double().flip(0, 1)
    diagonal = flipped.diagonal()
    mean = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    for _ in range(DAMPING_STEPS):
        damped = flipped + torch.diag_embed((damping * mean).expand_as(diagonal))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
            return inverse.flip(0, 1)
        damping = max(damping, 1e-4) * 10
    raise QuantkitError(
        f"the Hessian is not positive definite even with damping {damping / 10:.3g}; it must be a "
        "mean of x x^T: collect it again, from more calibration text."
    )


def _round_group(
    rest: Tensor,
    feedback: Tensor,
    columns: tuple[int, int],
    scales: Tensor,
    zeros: Tensor,
    bits: int,
) -> list[Tensor]:
    """Rounds the columns from the first to before the second, in blocks.

    Args:
        rest: float32 [N, K]; columns behind each block are changed by the block's errors.
        feedback: float32 [K, K], U of `inverse_factor`.
        columns: begin and end of the group.
        scales: float32 [N, 1].
        zeros: uint8 [N, 1].
        bits: 2 to 8.

    Returns:
        codes of each block, uint8 [N, up to BLOCK_CHANNELS].
    """
    codes = []
    begin, end = columns
    for start in range(begin, end, BLOCK_CHANNELS):
        block = slice(start, min(start + BLOCK_CHANNELS, end))
        behind = slice(block.stop, None)
        rounded, errors = _round_block(rest[:, block], feedback[block, block], scales, zeros, bits)
        rest[:, behind] -= errors @ feedback[block, behind]
        codes.append(rounded)
    return codes


def _round_block(
    weight: Tensor, feedback: Tensor, scales: Tensor, zeros: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Rounds column i, then w[:, j] -= e_i U[i, j] for j > i, e_i = (w_i - q_i) / U[i, i].

    Args:
        weight: float32 [N, B].
        feedback: float32 [B, B], the block U of `inverse_factor`.
        scales: float32 [N, 1].
        zeros: uint8 [N, 1].
        bits: 2 to 8.

    Returns:
        codes uint8 [N, B], errors e float32 [N, B].
    """
    weight = weight.clone()
    codes = torch.empty_like(weight, dtype=torch.uint8)
    errors = torch.empty_like(weight)
    for i in range(weight.shape[1]):
        column = weight[:, i : i + 1]
        code = quantize_codes(column, scales, zeros, bits)
        error = (column - dequantize_codes(code, scales, zeros)) / feedback[i, i]
        weight[:, i + 1 :] -= error * feedback[i, i + 1 :]
        codes[:, i : i + 1], errors[:, i : i + 1] = code, error
    return codes, errors
