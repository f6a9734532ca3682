"""GPTQ: round one input channel at a time, and let the channels not yet rounded make up for it.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
https://arxiv.org/abs/2210.17323. The feedback is taken from the Hessian's own factorisation, which
gives the same codes as the paper's factor of the inverse and inverts nothing (Chee et al.,
"QuIP: 2-Bit Quantization of Large Language Models With Guarantees",
https://arxiv.org/abs/2307.13304, theorem 6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.quantize.methods.rtn import (
    find_grid,
    finite_weight,
    group_width,
    in_channel_order,
    is_finite,
    reordered,
    split_groups,
)
from vllm_quantkit.quantize.recipes.recipe import Order
from vllm_quantkit.spec import WeightSpec

LEAF_CHANNELS = 32
"""Channels rounded one by one before a matrix product carries their errors over to others."""

DAMPING_STEPS = 8
"""How often the damping grows tenfold before a Hessian is given up."""

SMALLEST_PIVOT = 1e-3
"""Share of a diagonal entry that must be left in its float32 pivot: below, rounding errors of the
factorisation reach into the feedback, and it is done again in float64."""


@dataclass(frozen=True)
class Feedback:
    """M D M^T = H + d I, M unit upper triangular: tr(E (H + d I) E^T) = sum_k D_k |(E M)_k|^2.

    With q_k = round(w_k + sum_{j < k} e_j M[j, k]), (E M)_k is the error of that rounding alone.

    Attributes:
        matrix: float32 [K, K], M.
        activity: float32 [K], the diagonal of H.
        damping: d as a share of that diagonal's mean.
    """

    matrix: Tensor
    activity: Tensor
    damping: float


def gptq(
    weight: Tensor,
    hessian: Tensor,
    spec: WeightSpec,
    *,
    order: Order = "none",
    damping: float = 0.01,
    clip: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[QuantizedWeight, float]:
    """Lowers tr(E H E^T), E = W - dequantise(codes): each channel makes up for those before it.

    Args:
        weight: float [N, K]; rows do not depend on each other, so layers that read the same input
            can be stacked.
        hessian: float [K, K], mean of x x^T over the layer's inputs x; any positive factor.
            A channel that never fires is rounded to nearest and disturbs no other.
        spec: the numerics.
        order: of the channels, see `recipe.Order`.
        damping: share of the mean diagonal that is added to the diagonal; grows tenfold for as
            long as the Hessian is not positive definite.
        clip: True takes each group's range of least error instead of the full one.
        scale_dtype: what the checkpoint stores scales in; codes are made for the rounded scale.

    Returns:
        the codes, and the damping that it took.

    Raises:
        QuantkitError: the weight is not finite; `hessian_fault`; no damping makes the Hessian
            positive definite; or the feedback overflows.
    """
    weight = finite_weight(weight)
    natural = torch.arange(weight.shape[1], device=weight.device)
    channels = natural
    if order != "none":
        channels = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        hessian = reordered(hessian, channels)
    feedback = find_feedback(hessian, damping)

    def grids(groups: Tensor, activity: Tensor) -> tuple[Tensor, Tensor]:
        return find_grid(groups, spec, clip=clip, hessian=activity, scale_dtype=scale_dtype)

    rounding = _Rounding(weight.T.contiguous().index_select(0, channels), feedback, spec, grids)
    if order == "static":
        rounding.use_grids_of(weight, channels)
    rounding.solve(0, len(channels))
    rounding.refuse_overflow()
    codes = rounding.codes.T
    if order == "static":
        codes = codes.contiguous().index_select(1, torch.argsort(channels))
    scales, zeros = rounding.scales.T.contiguous(), rounding.zeros.T.to(torch.uint8).contiguous()
    stored = channels if order == "group" else natural
    return in_channel_order(codes, scales, zeros, stored, spec), feedback.damping


def find_feedback(hessian: Tensor, damping: float) -> Feedback:
    """M D M^T = H + d I by one Cholesky factorisation, of H with its channels reversed.

    Args:
        hessian: float [K, K], symmetric.
        damping: grows tenfold until the factorisation succeeds.

    Raises:
        QuantkitError: `hessian_fault`, or it stays indefinite.
    """
    fault = hessian_fault(hessian)
    if fault:
        raise QuantkitError(fault)
    mean = float(hessian.diagonal().double().mean())
    flipped = hessian.flip(0, 1).div_(mean if mean > 0 else 1.0)
    for _ in range(DAMPING_STEPS):
        lower = _cholesky(flipped, damping)
        if lower is not None:
            matrix = lower.div_(lower.diagonal().clone()).flip(0, 1)
            return Feedback(matrix, hessian.diagonal().float(), damping)
        damping = max(damping, 1e-4) * 10
    raise QuantkitError(
        f"the Hessian is not positive definite even with damping {damping / 10:.3g}; it must be a "
        "mean of x x^T: collect it again, from more calibration text."
    )


def hessian_fault(hessian: Tensor) -> str:
    """Why this is no mean of x x^T; empty where it may be one."""
    if not is_finite(hessian):
        return (
            "the Hessian has NaN or infinite values, so the calibration activations overflowed: "
            "run calibration in float32, or check the model's weights."
        )
    negative = int((hessian.diagonal() < 0).sum())
    if negative:
        return (
            f"the Hessian has {negative} negative values on its diagonal of {len(hessian)}, which "
            "no mean of x x^T has: collect it again."
        )
    return ""


def _cholesky(matrix: Tensor, damping: float) -> Tensor | None:
    """The lower factor of matrix + damping * I as float32, or None where there is none."""
    for dtype in (torch.float32, torch.float64):
        damped = matrix.to(dtype, copy=True)
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        pivots = lower.diagonal().square()
        if dtype is torch.float64 or bool((pivots > SMALLEST_PIVOT * damped.diagonal()).all()):
            break
    return None if int(failed) else lower.float()


class _Rounding:
    """The rounding of a weight's channels, first to last; tensors are channel-major.

    Args:
        weight: float32 [K, N].
        feedback: of the channels in the same order.
        spec: the numerics.
        grids: scales and zeros [N, G, 1] for groups [N, G, g] of channels of activity [G, g].

    Attributes:
        codes: uint8 [K, N].
        scales: float32 [G, N].
        zeros: float32 [G, N].
    """

    def __init__(
        self,
        weight: Tensor,
        feedback: Feedback,
        spec: WeightSpec,
        grids: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        self._weight, self._rest = weight, weight.clone()
        self._errors = torch.empty_like(weight)
        self._feedback, self._grids, self._levels = feedback, grids, 2**spec.bits - 1
        self._width = group_width(spec, len(weight))
        self._group_of = torch.arange(len(weight), device=weight.device) // self._width
        self._grids_are_known, self._leaf = False, min(LEAF_CHANNELS, self._width)
        self.codes = torch.empty_like(weight, dtype=torch.uint8)
        self.scales = weight.new_empty(spec.num_groups(len(weight)), weight.shape[1])
        self.zeros = torch.empty_like(self.scales)

    def use_grids_of(self, weight: Tensor, channels: Tensor) -> None:
        """Rounds to the grids of the natural groups of float32 [N, K], given in this order."""
        groups = split_groups(weight, self._width)
        activity = torch.empty_like(self._feedback.activity)
        activity[channels] = self._feedback.activity
        scales, zeros = self._grids(groups, split_groups(activity[None], self._width)[0])
        self.scales, self.zeros = scales[..., 0].T.contiguous(), zeros[..., 0].T.float()
        self._group_of = channels // self._width
        self._grids_are_known, self._leaf = True, LEAF_CHANNELS

    def refuse_overflow(self) -> None:
        """Refuses codes that were made from NaN or infinity."""
        if not is_finite(self._errors):
            raise QuantkitError(
                "the errors fed back to later channels grew beyond float32; the Hessian is too "
                "close to singular: raise the damping."
            )

    def solve(self, begin: int, end: int) -> None:
        """Rounds channels begin to end - 1, on which all errors made before have been carried."""
        if not self._grids_are_known and self._is_group(begin, end):
            self._find_grid(begin, end)
        if end - begin <= self._leaf:
            self._round(begin, end)
            return
        middle = self._middle(begin, end)
        self.solve(begin, middle)
        carried = self._feedback.matrix[begin:middle, middle:end]
        self._rest[middle:end].addmm_(carried.T, self._errors[begin:middle])
        self.solve(middle, end)

    def _is_group(self, begin: int, end: int) -> bool:
        return begin % self._width == 0 and end == min(begin + self._width, len(self._weight))

    def _middle(self, begin: int, end: int) -> int:
        """About half of the way, a whole number of groups or else of leaves after `begin`."""
        several = end - begin > self._width and not self._grids_are_known
        step = self._width if several else LEAF_CHANNELS
        return begin + max(1, (end - begin) // step // 2) * step

    def _find_grid(self, begin: int, end: int) -> None:
        """The grid of a group as the errors before it have made it: W + E M inverse(M of group).

        Of what is carried to a channel, those between will take their share back as they are
        rounded: that is in M, and must not be in the grid.
        """
        weight, within = self._weight[begin:end], self._feedback.matrix[begin:end, begin:end]
        carried = self._rest[begin:end] - weight
        kept = torch.linalg.solve_triangular(within.T, carried, upper=False, unitriangular=True)
        group = kept.add_(weight).T.contiguous()[:, None]
        scales, zeros = self._grids(group, self._feedback.activity[None, begin:end])
        index = begin // self._width
        self.scales[index], self.zeros[index] = scales[:, 0, 0], zeros[:, 0, 0]

    def _round(self, begin: int, end: int) -> None:
        """q_k = round(w_k + sum_j e_j M[j, k]), e_j = w_j - q_j, one channel k at a time."""
        index = self._group_of[begin:end]
        scales, zeros = (grid.index_select(0, index) for grid in (self.scales, self.zeros))
        inverse = scales.reciprocal()
        aims = torch.addcmul(zeros, self._weight[begin:end], inverse)
        factors = self._feedback.matrix[begin:end, begin:end].T.contiguous()
        errors, codes = self._errors[begin:end], torch.empty_like(scales)
        for k, row in enumerate(self._rest[begin:end]):
            if k:
                row.addmv_(errors[:k].T, factors[k, :k])
            code, error = codes[k], errors[k]
            torch.addcmul(zeros[k], row, inverse[k], out=code).round_().clamp_(0, self._levels)
            torch.sub(aims[k], code, out=error).mul_(scales[k])
        self.codes[begin:end] = codes
