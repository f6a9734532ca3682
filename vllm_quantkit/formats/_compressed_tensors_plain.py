"""Tensors of the formats with an element for each weight: `int-`, `float-`, `naive-quantized`.

The equations are in `compressed_tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from quantkit_kernels.code_types import FLOAT8_DTYPES
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.formats._compressed_tensors_packed import order_tensors
from vllm_quantkit.formats._eight_bit import (
    ONE,
    decode_integers,
    encode_integers,
    gather_rows,
    is_per_tensor,
    number_tensor,
    per_channel_shapes,
    scale_tensor,
    spread_rows,
    table_shape,
    weight_tensor,
)
from vllm_quantkit.formats.base import CheckpointTensor, Role
from vllm_quantkit.spec import PER_CHANNEL, LayerShape, SchemeSpec, WeightSpec

CODES = "weight"


def tensors(spec: SchemeSpec, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
    """weight, weight_scale, and where the spec has them zeros, order and static scales.

    Raises:
        UnsupportedScheme: the spec is one that the format cannot store.
    """
    weight = spec.weight
    _check_storable(spec)
    shapes = _scale_shapes(weight, shape)
    scales = scale_tensor("weight_scale", weight, shape, shapes)
    zeros = () if weight.symmetric else (_zero_tensor(scales, weight, shape),)
    order = order_tensors(weight, shape.in_features)
    return (weight_tensor(weight, shape), scales, *zeros, *order, *_static_tensors(spec))


def infer_shape(shapes: Mapping[str, tuple[int, ...]]) -> LayerShape:
    """N and K from the shape of `weight`."""
    N, K = shapes[CODES]
    return LayerShape(out_features=N, in_features=K)


def decode_zeros(stored: Tensor, bits: int, rows: int, groups: int, height: int) -> Tensor:
    """zeros[n, g] = stored[n // height, g] + 2**(bits - 1): int8 to uint8 [N, G]."""
    return spread_rows(decode_integers(stored, bits), rows, groups, height)


def encode_zeros(zeros: Tensor, bits: int, height: int, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `decode_zeros`."""
    return encode_integers(gather_rows(zeros, height), bits).reshape(shape)


def encode_input_zero(zero: Tensor) -> Tensor:
    """float32 [1] to int8 [1]."""
    return zero.to(torch.int8, copy=True)


def _scale_shapes(weight: WeightSpec, shape: LayerShape) -> tuple[tuple[int, ...], ...]:
    if is_per_tensor(weight):
        return ((1,), *ONE)
    if weight.group_size == PER_CHANNEL and weight.scale_rows == 1:
        return per_channel_shapes(shape)
    return (table_shape(weight, shape),)


def _zero_tensor(
    scales: CheckpointTensor, weight: WeightSpec, shape: LayerShape
) -> CheckpointTensor:
    """weight_zero_point, laid out as the scales are."""
    rows, groups = shape.out_features, weight.num_groups(shape.in_features)
    height = rows if weight.scale_rows < 1 else weight.scale_rows
    return replace(
        scales,
        name="weight_zero_point",
        role=Role.ZEROS,
        dtypes=(torch.int8,),
        decode=partial(decode_zeros, bits=weight.bits, rows=rows, groups=groups, height=height),
        encode=partial(encode_zeros, bits=weight.bits, height=height, shape=scales.shape),
    )


def _static_tensors(spec: SchemeSpec) -> tuple[CheckpointTensor, ...]:
    activation = spec.activation
    if activation is None or activation.dynamic:
        return ()
    scale = number_tensor("input_scale", Role.INPUT_SCALE)
    if activation.symmetric:
        return (scale,)
    zero = number_tensor("input_zero_point", Role.INPUT_ZERO)
    return (scale, replace(zero, dtypes=(torch.int8,), encode=encode_input_zero))


def _check_storable(spec: SchemeSpec) -> None:
    weight = spec.weight
    floats = weight.code_type in FLOAT8_DTYPES and weight.bits == 8 and weight.symmetric
    if not floats and weight.code_type != "int":
        raise UnsupportedScheme(
            f"compressed-tensors format {spec.variant!r} cannot store {weight.bits} bits of "
            f"{weight.code_type!r}: it holds integers and symmetric 8-bit floats. Use the dialect "
            "'bitsandbytes' for code books."
        )
