"""What may be asked of the activation ops; refusals are one sentence."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from quantkit_kernels.act_quant.rows import (
    PER_TENSOR,
    PER_TOKEN,
    ROW_ALIGNMENT,
    RowCode,
    RowQuantizer,
)
from quantkit_kernels.devices import check_activations

How = tuple[Tensor | None, Tensor | None, RowCode, int, bool, float, int]
"""scale, zero, and the fields of a quantizer in order: the arguments all four ops end with."""


@lru_cache(maxsize=256)
def _quantizer(
    code: RowCode,
    group_size: int,
    symmetric: bool,
    upper_bound: float,
    sum_group: int,
    static: bool,
    zero: bool,
) -> RowQuantizer:
    """The quantizer of these fields, checked together with the presence of a scale and a zero."""
    if code not in ("int8", "e4m3"):
        raise ValueError(f"rows of code {code!r} are not served; use 'int8' or 'e4m3'")
    if group_size < PER_TOKEN:
        raise ValueError(
            f"group_size is {group_size}; use -1 (token), 0 (tensor) or a positive one"
        )
    if not upper_bound > 0:
        raise ValueError(f"upper_bound is {upper_bound}; it must be positive, or infinity for none")
    if code == "e4m3" and not symmetric:
        raise ValueError("rows of E4M3 have no zero-point; use symmetric=True or code 'int8'")
    if code == "e4m3" and sum_group:
        raise ValueError(f"sum_group is {sum_group}, but codes of E4M3 are not summed; use 0")
    if static and group_size != PER_TENSOR:
        raise ValueError(f"group_size is {group_size}, but a static scale serves a tensor; use 0")
    if static and zero == symmetric:
        given = "is" if zero else "is not"
        raise ValueError(
            f"a static zero-point {given} given and symmetric is {symmetric}; give one exactly "
            "where rows are not symmetric"
        )
    if zero and not static:
        raise ValueError("a zero-point is given without a scale; give both or neither")
    if not static and not symmetric and group_size != PER_TOKEN:
        raise ValueError(
            f"group_size is {group_size}, but dynamic zero-points are per token; use -1"
        )
    return RowQuantizer(code, group_size, symmetric, upper_bound, sum_group)


def _check_sums(sum_group: int, width: int) -> None:
    if sum_group < 0 or (sum_group % ROW_ALIGNMENT and sum_group != width):
        raise ValueError(
            f"sum_group is {sum_group}; use a multiple of {ROW_ALIGNMENT}, the {width} channels of "
            "a row for one sum, or 0 for none"
        )


def check_inputs(x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None) -> None:
    """Refuse dtypes and shapes that do not fit together.

    Raises:
        ValueError: they do not.
    """
    check_activations(x.dtype)
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},)")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {residual.dtype} {tuple(residual.shape)}; x is {x.dtype} "
            f"{tuple(x.shape)}, and both must agree"
        )


def gated_width(x: Tensor) -> int:
    """K of x [..., 2 K].

    Raises:
        ValueError: x has an odd number of channels.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x has {x.shape[-1]} channels; silu_mul takes 2 K, an even number")
    return x.shape[-1] // 2


def parse(how: How, width: int) -> RowQuantizer:
    """The quantizer of rows of `width` channels.

    Raises:
        ValueError: its fields do not fit together, or not the rows.
    """
    scale, zero, *fields = how
    for given in (scale, zero):
        if given is not None and given.shape != (1,):
            raise ValueError(
                f"a static scale or zero-point has shape {tuple(given.shape)}; use (1,)"
            )
    quantizer = _quantizer(*fields, scale is not None, zero is not None)
    _check_sums(quantizer.sum_group, width)
    return quantizer
