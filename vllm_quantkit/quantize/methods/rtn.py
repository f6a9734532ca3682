"""Round to nearest, and the grids that every method rounds to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_kernels.quant_math import minmax_scales, quantize_codes
from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.spec import PER_CHANNEL, WeightSpec

CLIP_RATIOS = tuple(1 - step / 40 for step in range(21))
"""Shares of a group's range that clipping tries: 1 down to 0.5, the bounds AWQ uses."""

WEIGHTED_RATIOS = (
    *(1 - step / 40 for step in range(5)),
    *(0.85 - step / 20 for step in range(4)),
    *(0.7 * 0.875**step for step in range(1, 13)),
)
"""Those it tries where channels weigh differently, down to 0.14: a few that fire far more than the
others of their group want steps that suit them, whatever that cuts off elsewhere."""

BLOCK_VALUES = 1 << 18
"""Weights that a search works on at a time: its temporaries stay in cache."""

WIDEST_BLOCK = 256
"""Channels of the widest group for which clipping looks at correlations between inputs."""


def rtn(
    weight: Tensor,
    spec: WeightSpec,
    *,
    order: Tensor | None = None,
    clip: bool = False,
    hessian: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedWeight:
    """W ~ scale * (code - zero), code = round(W / scale) + zero, scale from the group's range.

    Args:
        weight: float [N, K].
        spec: the numerics.
        order: int64 [K], a permutation: consecutive channels of it share a group. None means
            0 .. K - 1.
        clip: True searches the range that minimises the squared error, instead of the full one.
        hessian: float [K, K], mean of x x^T over the inputs x: clipping then minimises the error
            that each group adds to the output, see `group_hessians`. None counts every channel
            alike.
        scale_dtype: what the checkpoint stores scales in; codes are made for the rounded scale.

    Raises:
        QuantkitError: the weight is not finite, or too large for `scale_dtype`.
    """
    weight = finite_weight(weight)
    if order is None:
        order = torch.arange(weight.shape[1], device=weight.device)
    elif hessian is not None:
        hessian = reordered(hessian, order)
    groups = split_groups(weight.index_select(1, order), group_width(spec, weight.shape[1]))
    blocks = None
    if clip and hessian is not None:
        blocks = group_hessians(hessian.float(), groups.shape[2])
    scales, zeros = find_grid(groups, spec, clip=clip, hessian=blocks, scale_dtype=scale_dtype)
    codes = quantize_codes(groups, scales, zeros, spec.bits).flatten(1)[:, : weight.shape[1]]
    return in_channel_order(codes, scales.squeeze(-1), zeros.squeeze(-1), order, spec)


def find_grid(
    groups: Tensor,
    spec: WeightSpec,
    *,
    clip: bool = False,
    hessian: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """Scale = ratio * range / levels, with the ratio of least e H_g e^T, e = w - rounded w.

    Args:
        groups: float32 [N, G, g].
        spec: bits and symmetry are used.
        clip: False takes ratio 1.
        hessian: float32 [G, g, g], or [G, g], the diagonals alone; None means the identity.
        scale_dtype: what scales are rounded to.

    Returns:
        scales float32 [N, G, 1], each representable in `scale_dtype`; zeros uint8 [N, G, 1].
    """
    full, zeros = minmax_scales(groups, spec.bits, symmetric=spec.symmetric)
    if not clip:
        return round_scales(full, scale_dtype), zeros
    rows = max(1, BLOCK_VALUES // groups[0].numel())
    best = torch.empty_like(full)
    for start in range(0, len(groups), rows):
        part = slice(start, start + rows)
        grid = _Grid(groups[part], full[part], zeros[part].float(), 2**spec.bits - 1)
        best[part] = grid.clip(hessian, scale_dtype)
    return best, zeros


def round_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest positive numbers that `dtype` can store, as float32.

    Raises:
        QuantkitError: a scale is beyond the range of `dtype`.
    """
    stored = scales.to(dtype)
    if bool(torch.isinf(stored).any()):
        raise QuantkitError(
            f"a scale of {scales.max():.3g} does not fit in {dtype}; the weight has outliers that "
            "no integer grid can hold: leave this layer in 16 bits, or store bfloat16 scales."
        )
    info = torch.finfo(dtype)
    least = max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)
    return stored.float().clamp_min(least)


def in_channel_order(
    codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor, spec: WeightSpec
) -> QuantizedWeight:
    """codes[:, order[i]] = given codes[:, i], and channel order[i] belongs to group i // g.

    Args:
        codes: uint8 [N, K], columns as `order` lists them.
        scales: float32 [N, G].
        zeros: uint8 [N, G].
        order: int64 [K], a permutation.
        spec: the numerics.
    """
    position = torch.argsort(order)
    group_index = position // group_width(spec, order.numel())
    codes = codes.contiguous().index_select(1, position)
    return QuantizedWeight(codes, scales, zeros, group_index.to(torch.int32), spec.bits)


def group_width(spec: WeightSpec, in_features: int) -> int:
    """Channels per group: `group_size`, or all of them per channel."""
    return in_features if spec.group_size == PER_CHANNEL else spec.group_size


def split_groups(weight: Tensor, width: int) -> Tensor:
    """[N, K] to [N, ceil(K / width), width]; zeros fill the last group and change no range."""
    missing = -weight.shape[1] % width
    return torch.nn.functional.pad(weight, (0, missing)).view(len(weight), -1, width)


def diagonal_blocks(hessian: Tensor, width: int) -> Tensor:
    """[K, K] to the [ceil(K / width), width, width] on its diagonal, filled with zeros."""
    missing = -hessian.shape[0] % width
    padded = torch.nn.functional.pad(hessian, (0, missing, 0, missing))
    count = len(padded) // width
    square = padded.view(count, width, count, width)
    return square.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def group_hessians(hessian: Tensor, width: int) -> Tensor:
    """What clipping looks at of each group's inputs: [G, g, g], or [G, g] of wide groups.

    The diagonal gives most of the gain, and the rest costs g times as much.
    """
    if width <= WIDEST_BLOCK:
        return diagonal_blocks(hessian, width)
    return split_groups(hessian.diagonal()[None], width)[0]


def reordered(hessian: Tensor, order: Tensor) -> Tensor:
    """H[order[i], order[j]]: [K, K]."""
    return hessian.index_select(0, order).index_select(1, order)


def finite_weight(weight: Tensor) -> Tensor:
    """The weight as float32 [N, K].

    Raises:
        QuantkitError: it has NaN or infinity.
    """
    if not is_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        raise QuantkitError(
            f"the weight has {bad} NaN or infinite values among {weight.numel()}; quantising would "
            "spread them over their groups: repair or re-download the checkpoint."
        )
    return weight.detach().float()


def is_finite(values: Tensor) -> bool:
    """True where there is no NaN and no infinity; one pass, nothing allocated."""
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(values))


@dataclass(frozen=True)
class _Grid:
    """A search for the best scales of some rows.

    Attributes:
        groups: float32 [N, G, g].
        full: float32 [N, G, 1], scales of the full range.
        zeros: float32 [N, G, 1].
        levels: largest code.
    """

    groups: Tensor
    full: Tensor
    zeros: Tensor
    levels: int

    def clip(self, hessian: Tensor | None, scale_dtype: torch.dtype) -> Tensor:
        """The full scales times the ratios of least error: [N, G, 1]."""
        work = torch.empty_like(self.groups), torch.empty_like(self.groups)
        best, least = self.full, torch.full_like(self.full, torch.inf)
        for ratio in CLIP_RATIOS if hessian is None else WEIGHTED_RATIOS:
            scales = round_scales(self.full * ratio, scale_dtype)
            error = self._error(scales, hessian, work)
            best = torch.where(error < least, scales, best)
            least = torch.minimum(error, least)
        return best

    def _error(self, scales: Tensor, hessian: Tensor | None, work: tuple[Tensor, Tensor]) -> Tensor:
        """(w - q) H_g (w - q)^T for each row and group, [N, G, 1]; overwrites `work`."""
        steps, codes = work
        torch.addcmul(self.zeros, self.groups, scales.reciprocal(), out=steps)
        torch.round(steps, out=codes).clamp_(0, self.levels)
        steps.sub_(codes)
        if hessian is None:
            weighted = steps.square_()
        elif hessian.dim() == 2:
            weighted = steps.square_().mul_(hessian)
        else:
            weighted = torch.einsum("ngi,gij->ngj", steps, hessian).mul_(steps)
        return weighted.sum(-1, keepdim=True) * scales.square()
