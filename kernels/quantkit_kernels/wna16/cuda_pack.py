"""CUDA: a weight in the layout of `cuda_layout`. It needs no Triton, so any machine can lay out."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.wna16.cuda_layout import TILE_K, pack_codes, pack_scales, padded_columns
from quantkit_kernels.wna16.names import CUDA_CONTAINERS, cuda_name
from quantkit_kernels.wna16.weights import PackedWeight, UniformWeight

CONTAINERS = CUDA_CONTAINERS


def pack(weight: UniformWeight, dtype: torch.dtype, *, quads: bool = False) -> PackedWeight:
    """Codes and scales in the layout of `cuda_layout`; one layout for all dtypes.

    A row whose groups all have one scale and zero-point has them once, as a whole.

    Args:
        weight: any.
        dtype: of the activations.
        quads: threads have four neighbouring columns.
    """
    columns = padded_columns(weight.codes.shape[1])
    gather = weight.gather
    if gather is not None:
        missing = columns - gather.numel()
        gather = torch.nn.functional.pad(gather, (0, missing), value=weight.in_features)
    bits, code_type, group_size = weight.container_bits, weight.code_type, weight.group_size
    scales, zeros = weight.scales, weight.zeros if code_type == "int" else None
    if columns > TILE_K and _same_in_a_row(scales) and (zeros is None or _same_in_a_row(zeros)):
        group_size, scales, zeros = columns, scales[:, :1], None if zeros is None else zeros[:, :1]
    return PackedWeight(
        codes=pack_codes(weight.codes, bits, quads=quads),
        scales=pack_scales(scales, zeros, group_size),
        zeros=None,
        gather=gather,
        bits=bits,
        group_size=group_size,
        in_features=weight.in_features,
        out_features=weight.codes.shape[0],
        kernel=cuda_name(bits, code_type, dtype),
        code_type=code_type,
        zero=None if zeros is None else _common_zero(zeros),
    )


def _same_in_a_row(values: Tensor) -> bool:
    return bool((values == values[:, :1]).all())


def _common_zero(zeros: Tensor) -> int | None:
    """The zero-point of all groups of all rows, if it is one."""
    first = zeros[0, 0]
    return int(first) if bool((zeros == first).all()) else None
