"""8-bit weights for 8-bit activations: a weight after packing, and which pairs are served."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from quantkit_kernels.act_quant.rows import RowCode, RowQuantizer
from quantkit_kernels.code_types import FLOAT8_DTYPES, CodeType
from quantkit_kernels.wna16.weights import QuantizedWeight

INT8_ZERO = 128
"""The zero-point of symmetric 8-bit integers, which kernels subtract from all codes."""

GROUP_ALIGNMENT = 16
"""Group sizes are multiples of this, unless one group spans the row."""

MAX_INT8_FEATURES = 1 << 16
"""Input channels of an integer product: sums of 255 * 128 a channel stay below 2**31."""

MAX_ASYMMETRIC_FEATURES = 1 << 15
"""The same where both sides have zero-points: sums of 255 * 255 a channel."""


@dataclass(frozen=True)
class ScaledWeight:
    """A weight in the layout of the kernel that will run it; each device module describes its own.

    Attributes:
        codes: 8-bit codes, packed.
        scales: float32 scales, packed.
        sums: sum over k of (code - zero-point) for each output channel, packed; None where the
            kernel needs none.
        zeros: zero-point - 128 for each output channel, packed; None where all are 0. Rows then
            carry the sum of their codes.
        code_type: `int`, `e4m3` or `e5m2`.
        quantizer: how the rows it multiplies are quantised.
        group_size: input channels per scale; K for one scale per output channel.
        in_features: K, the channels of a row.
        out_features: N, the channels of y.
        kernel: the kernel's name, for the log.
    """

    codes: Tensor
    scales: Tensor
    sums: Tensor | None
    zeros: Tensor | None
    code_type: CodeType
    quantizer: RowQuantizer
    group_size: int
    in_features: int
    out_features: int
    kernel: str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        tensors = (self.codes, self.scales, self.sums, self.zeros)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def group_size_of(weight: QuantizedWeight) -> int:
    """Input channels per scale, K where a row has one; the last group may be short.

    Raises:
        ValueError: groups are not consecutive channels of one size, a multiple of 16.
    """
    columns, groups = weight.codes.shape[1], weight.scales.shape[1]
    size = columns if groups == 1 else int((weight.group_index == 0).sum())
    expected = torch.arange(columns, device=weight.group_index.device) // max(size, 1)
    if not torch.equal(weight.group_index.long(), expected) or size * groups < columns:
        raise ValueError(
            "the group index is not channel // group size; act-order and uneven groups are served "
            "with 16-bit activations only"
        )
    if groups > 1 and size % GROUP_ALIGNMENT:
        raise ValueError(f"groups of {size} channels are not served; use a multiple of 16")
    return size


def column_zeros(weight: QuantizedWeight) -> Tensor | None:
    """zero-point - 128 of each output channel, int32 [N]; None where all are 0.

    Args:
        weight: one group per channel if it has zero-points.
    """
    if weight.code_type != "int" or not bool((weight.zeros != INT8_ZERO).any()):
        return None
    return weight.zeros[:, 0].int() - INT8_ZERO


def column_sums(weight: QuantizedWeight) -> Tensor:
    """sum_k (codes[n, k] - zeros[n]), int32 [N], of integers with one group per channel."""
    sums = weight.codes.sum(1, dtype=torch.int32)
    return sums - weight.codes.shape[1] * weight.zeros[:, 0].int()


def rows_for(quantizer: RowQuantizer, in_features: int, zeros: Tensor | None) -> RowQuantizer:
    """How rows are quantised for a weight with `zeros`, of `column_zeros`: with their sum."""
    return quantizer if zeros is None else replace(quantizer, sum_group=in_features)


@lru_cache(maxsize=1024)
def row_quantizer(code: RowCode, group_size: int, in_features: int, summed: bool) -> RowQuantizer:
    """What lays rows out that an op is given, as far as their layout depends on it."""
    return RowQuantizer(code, group_size, sum_group=in_features if summed else 0)


def check_weight(weight: QuantizedWeight, quantizer: RowQuantizer) -> None:
    """Refuse pairs of weight and rows that no kernel multiplies, naming what does not fit.

    Raises:
        ValueError: bits, code types, zero-points or groups are not served together.
    """
    check_codes(weight.code_type, quantizer.code)
    if weight.bits != 8:
        raise ValueError(f"weights of {weight.bits} bits are not served with 8-bit rows; use 8")
    group_size = group_size_of(weight)
    if weight.code_type == "int":
        _check_integers(weight, quantizer)
    check_groups(quantizer, weight.codes.shape[1], group_size)


def check_codes(code_type: str, row_code: str) -> None:
    """Refuse code types that are not served together.

    Raises:
        ValueError: neither integers with int8 rows nor 8-bit floats with E4M3 rows.
    """
    served = {"int": "int8", **dict.fromkeys(FLOAT8_DTYPES, "e4m3")}
    if served.get(code_type) != row_code:
        raise ValueError(
            f"weights of {code_type} with rows of {row_code} are not served; use int with int8, "
            "or e4m3 or e5m2 with e4m3"
        )


def check_groups(quantizer: RowQuantizer, in_features: int, group_size: int) -> None:
    """Refuse rows whose scales do not fit the weight's.

    Raises:
        ValueError: rows have groups that are not the weight's, or integer rows have groups.
    """
    grouped = quantizer.layout(in_features).groups > 1
    if grouped and (quantizer.code == "int8" or quantizer.group_size != group_size):
        raise ValueError(
            f"rows in groups of {quantizer.group_size} do not fit a weight in groups of "
            f"{group_size}; use one scale per row, or e4m3 rows in the weight's groups"
        )


def _check_integers(weight: QuantizedWeight, quantizer: RowQuantizer) -> None:
    columns, groups = weight.codes.shape[1], weight.scales.shape[1]
    if groups != 1:
        raise ValueError(
            f"{groups} scales per output channel are not served with int8 rows; use one"
        )
    asymmetric = not quantizer.symmetric and bool((weight.zeros != INT8_ZERO).any())
    most = MAX_ASYMMETRIC_FEATURES if asymmetric else MAX_INT8_FEATURES
    if columns > most:
        raise ValueError(f"{columns} input channels are more than the {most} served")
