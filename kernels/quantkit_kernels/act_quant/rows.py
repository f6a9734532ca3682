"""Quantised activations in one tensor: each row carries its codes, scales and sums.

One uint8 tensor [M, stride] passes through a model's code where the 16-bit activations did, so a
norm or an activation function can quantise for the linear layer that follows it.

    bytes 0 .. K                      codes: int8 (two's complement) or E4M3
    bytes scales_at .. + 4 G          float32 scales, one per group of the row
    bytes zero_at .. + 4              float32 zero-point, a whole number; 0 where symmetric
    bytes sums_at .. + 4 S            int32 sums of the codes of `sum_group` channels, where asked

x[m, k] ~ scales[m, k // group_size] * (code[m, k] - zero[m]). Bytes between the parts are 0.
A group in which a value is NaN or infinite has the scale NaN; its codes, and sums of them, mean
nothing.

Sums serve weights with zero-points: sum_k q[k] (w[k] - z) = sum_k q[k] w[k] - z sum_k q[k]. They
are those of the codes as stored, the zero-point of the row included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RowCode = Literal["int8", "e4m3"]
"""What a row's codes are: two's complement integers, or E4M3 floats."""

ROW_ALIGNMENT = 16
"""Bytes: rows and scales start where a 16-byte load may."""

PER_TOKEN = -1
"""`group_size` of rows with one scale each."""

PER_TENSOR = 0
"""`group_size` of rows that share one dynamic scale; every row still carries it."""

LARGEST_CODE = {"int8": 127.0, "e4m3": 448.0}


@dataclass(frozen=True)
class RowLayout:
    """Where the parts of a row lie, in bytes.

    Attributes:
        in_features: K, codes in a row.
        groups: G, scales in a row.
        sums: S, sums in a row; 0 for none.
    """

    in_features: int
    groups: int
    sums: int = 0

    @property
    def scales_at(self) -> int:
        """Where the scales start."""
        return -(-self.in_features // ROW_ALIGNMENT) * ROW_ALIGNMENT

    @property
    def zero_at(self) -> int:
        """Where the zero-point is."""
        return self.scales_at + 4 * self.groups

    @property
    def sums_at(self) -> int:
        """Where the sums start, or would."""
        return self.zero_at + 4

    @property
    def end(self) -> int:
        """Where the last part ends."""
        return self.sums_at + 4 * self.sums

    @property
    def stride(self) -> int:
        """Bytes from a row to the next."""
        return -(-self.end // ROW_ALIGNMENT) * ROW_ALIGNMENT


@dataclass(frozen=True)
class RowQuantizer:
    """How activations are quantised.

    Attributes:
        code: what the codes are.
        group_size: channels that share a scale: `PER_TOKEN`, `PER_TENSOR` or a positive number.
        symmetric: False adds a zero-point per row (`int8` per token only, when dynamic).
        upper_bound: dynamic scales are made for at most this magnitude (FBGEMM); infinity for none.
        sum_group: channels whose codes are summed (`int8` only): a multiple of 16, or K for one sum
            per row; 0 for no sums.
    """

    code: RowCode
    group_size: int = PER_TOKEN
    symmetric: bool = True
    upper_bound: float = float("inf")
    sum_group: int = 0

    def layout(self, in_features: int) -> RowLayout:
        """The rows it makes of K channels."""
        groups = -(-in_features // self.group_size) if self.group_size > 0 else 1
        sums = -(-in_features // self.sum_group) if self.sum_group else 0
        return RowLayout(in_features, groups, sums)


@dataclass(frozen=True)
class Rows:
    """The parts of quantised rows.

    Attributes:
        codes: int8 or float8_e4m3fn [M, K].
        scales: float32 [M, G].
        zeros: float32 [M].
        group_size: channels that share a scale; K where the whole row does.
        sums: int32 [M, S], of the codes; None for none.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int
    sums: Tensor | None = None

    def dequantize(self) -> Tensor:
        """x as float32 [M, K]."""
        scales = self.scales.repeat_interleave(self.group_size, dim=1)[:, : self.codes.shape[1]]
        return scales * (self.codes.float() - self.zeros[:, None])


def sum_codes(codes: Tensor, sum_group: int) -> Tensor:
    """sums[m, s] = sum of codes[m, s * sum_group : (s + 1) * sum_group], int32 [M, S].

    Args:
        codes: int8 [M, K].
    """
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % sum_group))
    sums: Tensor = padded.unflatten(1, (-1, sum_group)).sum(-1, dtype=torch.int32)
    return sums


def split_rows(rows: Tensor, quantizer: RowQuantizer, in_features: int) -> Rows:
    """Views of the parts of `rows`, uint8 [M, stride]."""
    layout = quantizer.layout(in_features)
    dtype = torch.int8 if quantizer.code == "int8" else torch.float8_e4m3fn
    sums = rows[:, layout.sums_at : layout.end].view(torch.int32) if layout.sums else None
    return Rows(
        codes=rows[:, :in_features].view(dtype),
        scales=rows[:, layout.scales_at : layout.zero_at].view(torch.float32),
        zeros=rows[:, layout.zero_at : layout.sums_at].view(torch.float32)[:, 0],
        group_size=quantizer.group_size if quantizer.group_size > 0 else in_features,
        sums=sums,
    )


def join_rows(parts: Rows) -> Tensor:
    """The inverse of `split_rows`: uint8 [M, stride]."""
    codes, scales, zeros, sums = parts.codes, parts.scales, parts.zeros[:, None], parts.sums
    layout = RowLayout(codes.shape[1], scales.shape[1], 0 if sums is None else sums.shape[1])
    rows = torch.zeros(len(codes), layout.stride, dtype=torch.uint8, device=codes.device)
    rows[:, : codes.shape[1]] = codes.view(torch.uint8)
    rows[:, layout.scales_at : layout.zero_at] = scales.contiguous().view(torch.uint8)
    rows[:, layout.zero_at : layout.sums_at] = zeros.contiguous().view(torch.uint8)
    if sums is not None:
        rows[:, layout.sums_at : layout.end] = sums.contiguous().view(torch.uint8)
    return rows
