"""Weights with 16-bit activations: what a weight is before and after packing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_kernels.code_types import CODE_BOOKS, FLOAT8_DTYPES, CodeType, code_values
from quantkit_kernels.quant_math import dequantize_codes
from quantkit_kernels.wna16.names import container

CONTAINER_BITS = (2, 4, 8)
"""Widths in which codes may be stored; each device's module says which it stores."""

CONTAINER_OF = {**dict.fromkeys(FLOAT8_DTYPES, 8), **dict.fromkeys(CODE_BOOKS, 4)}
"""Container width of the code types that are not integers."""

GROUP_SIZES = (128, 64, 32, 16)
"""Group sizes that kernels serve, best first."""

PADDING_ALLOWANCE = 1.05
"""A larger group is worth up to 5 % more columns than the least possible."""


@dataclass(frozen=True)
class QuantizedWeight:
    """W[n, k] = scales[n, g(k)] * value(codes[n, k]), g(k) = group_index[k].

    Integers: value(code) = code - zeros[n, g(k)]. Others: value(code) = code_values(type)[code].
    Any bit width, group size, order and raggedness: what checkpoints mean, on any device.

    Attributes:
        codes: uint8 [N, K], each below 2**bits.
        scales: float32 [N, G].
        zeros: uint8 [N, G], 0 .. 2**bits (GPTQ's first format can store 2**bits); all 0, and not
            looked at, where the code type is not `int`.
        group_index: int32 [K], each in 0 .. G - 1.
        bits: 2 to 8.
        code_type: what a code stands for.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_index: Tensor
    bits: int
    code_type: CodeType = "int"

    def dequantize(self) -> Tensor:
        """W as float32 [N, K]."""
        index = self.group_index.long()
        if self.code_type == "int":
            return dequantize_codes(self.codes, self.scales[:, index], self.zeros[:, index])
        values = code_values(self.code_type).to(self.codes.device)
        return values[self.codes.long()] * self.scales[:, index]


@dataclass(frozen=True)
class UniformWeight:
    """W[n, k] = scales[n, k // g] * value(codes[n, k]) over gathered inputs.

    Every group has the same size g and K' is a multiple of g, so one kernel serves every
    checkpoint: y = [x, 0][:, gather] W^T.

    Attributes:
        codes: uint8 [N, K'], each below 2**container_bits.
        scales: float32 [N, K' / g].
        zeros: uint8 [N, K' / g].
        gather: int32 [K'], the input channel each column reads; None means 0 .. K' - 1 in order.
            A column that reads channel K or beyond is padding: its input is zero.
        group_size: g, a multiple of 16.
        in_features: K, the channels of x.
        container_bits: 2, 4 or 8.
        code_type: what a code stands for, as in `QuantizedWeight`. Padding of all but `int` holds
            a code whose value is 0.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    gather: Tensor | None
    group_size: int
    in_features: int
    container_bits: int
    code_type: CodeType = "int"


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the layout of the kernel that will run it; each device module describes its own.

    Attributes:
        codes: codes, packed.
        scales: group scales, packed.
        zeros: zero-points, packed; None where the layout holds them elsewhere.
        gather: int32 [K'], as in `UniformWeight`.
        bits: container width, 2, 4 or 8.
        group_size: input channels per scale.
        in_features: K, the channels of x.
        out_features: N, the channels of y.
        kernel: the kernel's name, for the log.
        code_type: what a code stands for.
        zero: the zero-point of all groups, where they share one and the kernel is faster for it.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    gather: Tensor | None
    bits: int
    group_size: int
    in_features: int
    out_features: int
    kernel: str
    code_type: CodeType = "int"
    zero: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        tensors = (self.codes, self.scales, self.zeros, self.gather)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def make_uniform(weight: QuantizedWeight, containers: tuple[int, ...] = (4, 8)) -> UniformWeight:
    """Reorder and pad input channels so that every group has one size.

    Args:
        weight: any.
        containers: widths in which the codes may be stored, ascending; the last holds all.

    Raises:
        ValueError: `group_index` names a group that has no scale.
    """
    num_groups = weight.scales.shape[1]
    _check_group_index(weight.group_index, num_groups)
    counts = torch.bincount(weight.group_index, minlength=num_groups).tolist()
    group_size = _uniform_group_size(counts)
    order = torch.argsort(weight.group_index, stable=True)
    columns, groups = _padded_columns(order, counts, group_size)
    in_features = weight.codes.shape[1]
    return UniformWeight(
        codes=_gather_codes(weight, columns),
        scales=weight.scales[:, groups],
        zeros=weight.zeros[:, groups],
        gather=None if _in_order(columns, in_features) else columns.to(torch.int32),
        group_size=group_size,
        in_features=in_features,
        container_bits=container(weight.bits, containers),
        code_type=weight.code_type,
    )


def _gather_codes(weight: QuantizedWeight, columns: Tensor) -> Tensor:
    """codes[:, columns], and a code whose value is 0 where a column reads channel K.

    The codes themselves, not a copy, where nothing moves.
    """
    in_features = weight.codes.shape[1]
    if columns.numel() == in_features and _in_order(columns, in_features):
        return weight.codes
    gathered = weight.codes[:, columns.clamp_max(in_features - 1)]
    return gathered.masked_fill_(columns == in_features, zero_code(weight.code_type))


def zero_code(code_type: CodeType) -> int:
    """A code whose value is 0; of integers, whose zero-points differ, simply 0."""
    return 0 if code_type == "int" else int((code_values(code_type) == 0).nonzero()[0])


def gather_inputs(x: Tensor, gather: Tensor | None, columns: int) -> Tensor:
    """[x, 0][:, gather]: the columns a `UniformWeight` multiplies, padding read as zero.

    Args:
        x: [M, K].
        gather: as in `UniformWeight`.
        columns: K'.

    Returns:
        [M, K'], `x` itself where nothing has to move.
    """
    missing = columns - x.shape[1]
    if gather is None:
        return torch.nn.functional.pad(x, (0, missing)) if missing else x
    return torch.nn.functional.pad(x, (0, 1)).index_select(1, gather)


def _check_group_index(group_index: Tensor, num_groups: int) -> None:
    low, high = int(group_index.min()), int(group_index.max())
    if low < 0 or high >= num_groups:
        raise ValueError(
            f"group_index spans {low} .. {high}, but the weight has groups 0 .. {num_groups - 1}"
        )


def _uniform_group_size(counts: list[int]) -> int:
    """The largest served group size that needs hardly more columns than the smallest one."""
    columns = {g: sum(-(-count // g) * g for count in counts) for g in GROUP_SIZES}
    least = min(columns.values())
    return next(g for g in GROUP_SIZES if columns[g] <= least * PADDING_ALLOWANCE)


def _padded_columns(order: Tensor, counts: list[int], group_size: int) -> tuple[Tensor, Tensor]:
    """Channel of each column (K for padding) and source group of each uniform group.

    Args:
        order: int64 [K], channels sorted by group.
        counts: channels in each source group.
        group_size: size of the uniform groups.

    Returns:
        columns int64 [K'], groups int64 [K' / group_size].
    """
    blocks = torch.tensor([-(-count // group_size) for count in counts], device=order.device)
    sizes = torch.tensor(counts, device=order.device)
    groups = torch.arange(len(counts), device=order.device).repeat_interleave(blocks)
    first_column = (blocks.cumsum(0) - blocks) * group_size
    first_channel = sizes.cumsum(0) - sizes
    source_group = torch.arange(len(counts), device=order.device).repeat_interleave(sizes)
    position = torch.arange(order.numel(), device=order.device)
    target = first_column[source_group] + position - first_channel[source_group]
    columns = torch.full((int(blocks.sum()) * group_size,), order.numel(), device=order.device)
    columns[target] = order
    return columns, groups


def _in_order(columns: Tensor, in_features: int) -> bool:
    """True where column c reads channel c and all padding stands at the end."""
    natural = torch.arange(columns.numel(), device=columns.device).clamp_max(in_features)
    return bool(torch.equal(columns, natural))
