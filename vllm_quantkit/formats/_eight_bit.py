"""Tensors with one element for each weight, which several dialects store alike.

weight[n, k] = the float8 whose bits are code[n, k], or the int8 code[n, k] - 2**(bits - 1)
scale[r, g]  = the scale of group g in the r-th block of rows                       [R, G]
input_scale  = the one static scale of the activations                              [] or [1]
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quantkit_kernels.code_types import FLOAT8_DTYPES
from vllm_quantkit.formats._layout import check_below
from vllm_quantkit.formats.base import CheckpointTensor, Role
from vllm_quantkit.spec import ALL_ROWS, PER_CHANNEL, LayerShape, WeightSpec

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of scales of 8-bit weights; float32 first, as most are too small for float16."""

ONE = ((), (1,), (1, 1))
"""Shapes that a single value has in checkpoints."""


def weight_tensor(weight: WeightSpec, shape: LayerShape) -> CheckpointTensor:
    """`weight` [N, K] in float8 or int8."""
    size = (shape.out_features, shape.in_features)
    if weight.code_type in FLOAT8_DTYPES:
        dtype = FLOAT8_DTYPES[weight.code_type]
        encode = partial(encode_floats, dtype=dtype)
        return CheckpointTensor("weight", Role.CODES, size, (dtype,), decode_floats, encode)
    return CheckpointTensor(
        "weight",
        Role.CODES,
        size,
        (torch.int8,),
        partial(decode_integers, bits=weight.bits),
        partial(encode_integers, bits=weight.bits),
    )


def scale_tensor(
    name: str,
    weight: WeightSpec,
    shape: LayerShape,
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...] = SCALE_DTYPES,
) -> CheckpointTensor:
    """Scales of blocks of rows, in one of `shapes`; the first is the one we write."""
    rows, groups = shape.out_features, weight.num_groups(shape.in_features)
    height = rows if weight.scale_rows == ALL_ROWS else weight.scale_rows
    return CheckpointTensor(
        name,
        Role.SCALES,
        shapes[0],
        dtypes,
        partial(decode_scales, rows=rows, groups=groups, height=height),
        partial(encode_scales, height=height, shape=shapes[0]),
        other_shapes=shapes[1:],
    )


def number_tensor(name: str, role: Role, *, optional: bool = False) -> CheckpointTensor:
    """A single number, such as `input_scale`."""
    return CheckpointTensor(
        name,
        role,
        (1,),
        SCALE_DTYPES,
        decode_number,
        decode_number,
        optional=optional,
        other_shapes=ONE,
    )


def table_shape(weight: WeightSpec, shape: LayerShape) -> tuple[int, int]:
    """(R, G): blocks of rows and groups that have a scale each."""
    rows = shape.out_features
    height = rows if weight.scale_rows == ALL_ROWS else weight.scale_rows
    return -(-rows // height), weight.num_groups(shape.in_features)


def per_channel_shapes(shape: LayerShape) -> tuple[tuple[int, ...], ...]:
    """Shapes of one scale per output channel."""
    return ((shape.out_features, 1), (shape.out_features,))


def is_per_tensor(weight: WeightSpec) -> bool:
    """True where the whole weight has one scale."""
    return weight.scale_rows == ALL_ROWS and weight.group_size == PER_CHANNEL


def decode_floats(stored: Tensor) -> Tensor:
    """The bits of float8 [N, K] as uint8 [N, K]."""
    return stored.view(torch.uint8).clone(memory_format=torch.contiguous_format)


def encode_floats(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `decode_floats`."""
    copied = codes.clone(memory_format=torch.contiguous_format)
    return copied.view(dtype)


def decode_integers(stored: Tensor, bits: int) -> Tensor:
    """codes = stored + 2**(bits - 1): int8 to uint8 of the same shape.

    Raises:
        ValueError: a value needs more than `bits` bits.
    """
    half = 1 << (bits - 1)
    codes = stored.to(torch.int16) + half
    if bits < 8 and codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2 * half):
        raise ValueError(
            f"values of {bits} bits lie in {-half} .. {half - 1}, but these in "
            f"{int(codes.min()) - half} .. {int(codes.max()) - half}"
        )
    return codes.to(torch.uint8)


def encode_integers(codes: Tensor, bits: int) -> Tensor:
    """Inverse of `decode_integers`."""
    check_below(codes, 2**bits, f"codes and zero-points of {bits} bits")
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def decode_scales(stored: Tensor, rows: int, groups: int, height: int) -> Tensor:
    """scales[n, g] = stored[n // height, g] in float32; see `spread_rows`."""
    return spread_rows(stored.to(torch.float32), rows, groups, height)


def encode_scales(scales: Tensor, height: int, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `decode_scales`, in the dtype they have."""
    return gather_rows(scales, height).reshape(shape).clone()


def spread_rows(stored: Tensor, rows: int, groups: int, height: int) -> Tensor:
    """values[n, g] = stored[n // height, g]: [R, G] to [rows, G].

    A single row holds for all, and as many rows as there are hold for one each, whatever `height`.
    """
    table = stored.reshape(-1, groups)
    repeats = {1: rows, rows: 1}.get(len(table), height)
    return table.repeat_interleave(repeats, dim=0)[:rows].clone()


def gather_rows(values: Tensor, height: int) -> Tensor:
    """Inverse of `spread_rows`: every `height`-th row.

    Raises:
        ValueError: rows that should share their values differ.
    """
    table = values[::height]
    if not torch.equal(table.repeat_interleave(height, dim=0)[: len(values)], values):
        raise ValueError(
            f"rows differ inside a block of {height} that is stored once; quantise with scales "
            "that whole blocks share, or store a scale for every row"
        )
    return table


def decode_number(stored: Tensor) -> Tensor:
    """A single number as float32 [1]."""
    return stored.reshape(1).to(torch.float32, copy=True)
