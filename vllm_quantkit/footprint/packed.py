"""Bytes of a quantised layer as it lies in memory, told by the kernels' own packing.

Every layout is made of panels of rows, so two small weights of the layer's width, one panel and
two, tell the size of any number of them.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import torch
from torch import Tensor

from quantkit_kernels.llm_int8.reference import ROWS as MIXED_ROWS
from quantkit_kernels.scaled_mm import pack_scaled
from quantkit_kernels.wna16 import QuantizedWeight, pack_weight
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.hardware.device import Device
from vllm_quantkit.schemes.w8a8 import own_groups, row_quantizer
from vllm_quantkit.spec import ALL_ROWS, LayerShape, SchemeSpec

PANEL_ROWS = {"cpu": 32, "cuda": 128}
"""Rows that a layout stores together."""

NUMBER_BYTES = 4
"""A static scale of the activations, and their zero-point, are a float32 each."""

BLOCK_ROWS = 128
"""A GPU's layout stores one scale for so many rows where they are those of blocks."""


def packed_bytes(
    spec: SchemeSpec,
    shape: LayerShape,
    device: Device,
    dtype: str = "bfloat16",
    *,
    rows: tuple[int, ...] = (),
    tp_inputs: int = 1,
) -> int:
    """Bytes of all tensors that a packed layer keeps, on one rank; of ranks that differ, the most.

    Args:
        spec: of the layer.
        shape: of the rank's share.
        device: whose kernels run it.
        dtype: of the activations.
        rows: of the rank in each merged partition; one partition where empty.
        tp_inputs: ranks that share the input channels; 1 where every rank has all.

    Raises:
        UnsupportedScheme: no kernel multiplies such a share.
    """
    kind = "cuda" if device.kind == "cuda" else "cpu"
    weight_only = runs_weight_only(spec, device)
    parts = rows or (shape.out_features,)
    # Partitions whose channels are ordered differently are packed one by one.
    segments = parts if spec.weight.act_order else (sum(parts),)
    aligned = all(part % BLOCK_ROWS == 0 for part in parts[:-1])
    return _static_bytes(spec, weight_only) + sum(
        _segment_bytes(spec, count, shape.in_features, kind, dtype, tp_inputs, weight_only, aligned)
        for count in segments
    )


def runs_weight_only(spec: SchemeSpec, device: Device) -> bool:
    """True where activations stay in 16 bits: as stored, or for want of FP8 arithmetic."""
    if spec.activation is None:
        return True
    floats = spec.weight.code_type != "int"
    return floats and device.kind == "cuda" and not device.multiplies_fp8


def _static_bytes(spec: SchemeSpec, weight_only: bool) -> int:
    activation = spec.activation
    if weight_only or activation is None or activation.dynamic:
        return 0
    return NUMBER_BYTES * (1 if activation.symmetric else 2)


@lru_cache(maxsize=4096)
def _segment_bytes(
    spec: SchemeSpec,
    rows: int,
    columns: int,
    kind: str,
    dtype: str,
    tp_inputs: int,
    weight_only: bool,
    aligned: bool,
) -> int:
    """Bytes of `rows` rows of this rank's `columns` channels."""
    panel = PANEL_ROWS[kind]

    def size(count: int, start: int) -> int:
        weight = _sample(spec, count, columns, columns * tp_inputs, start, aligned)
        return _pack(weight, spec, kind, getattr(torch, dtype), weight_only)

    sizes = []
    for start in _starts(spec, columns, tp_inputs):
        one, two = size(panel, start), size(2 * panel, start)
        sizes.append(one + (-(-rows // panel) - 1) * (two - one))
    return max(sizes)


def _starts(spec: SchemeSpec, columns: int, ranks: int) -> list[int]:
    """First channels of ranks that meet the groups' boundaries differently."""
    group = spec.weight.group_size
    if group <= 0 or spec.weight.act_order:
        return [0]
    different = group // gcd(columns, group)
    return [rank * columns for rank in range(min(ranks, different))]


def _pack(
    weight: QuantizedWeight, spec: SchemeSpec, kind: str, dtype: torch.dtype, weight_only: bool
) -> int:
    """Bytes of the weight in the layout of its kernel.

    Raises:
        UnsupportedScheme: no kernel takes it.
    """
    try:
        if weight_only:
            return pack_weight(weight, dtype, kind).nbytes
        assert spec.activation is not None
        if spec.activation.outlier_threshold is not None:
            return pack_scaled(weight, MIXED_ROWS, dtype, kind).nbytes
        own = own_groups(weight, spec.weight.group_size)
        return pack_scaled(own, row_quantizer(spec.activation), dtype, kind).nbytes
    except UnsupportedScheme:
        raise
    except ValueError as error:
        raise UnsupportedScheme(f"{spec.describe()}: {error}") from error


def _sample(
    spec: SchemeSpec, rows: int, columns: int, whole: int, start: int, aligned: bool
) -> QuantizedWeight:
    """A weight of this size whose scales and zero-points differ wherever the spec lets them.

    Args:
        spec: of the layer.
        rows: N.
        columns: this rank's channels, from `start` on.
        whole: channels of all ranks.
        start: first channel.
        aligned: blocks of rows begin at multiples of 128.
    """
    numerics = spec.weight
    groups = numerics.num_groups(whole)
    size = whole if numerics.group_size <= 0 else numerics.group_size
    channels = torch.arange(whole)
    if numerics.act_order:
        channels = torch.randperm(whole, generator=torch.Generator().manual_seed(0))
    index = (channels // size)[start : start + columns].to(torch.int32)
    height = rows if numerics.scale_rows == ALL_ROWS else numerics.scale_rows if aligned else 1
    scales = _different(rows, groups, height).float()
    zeros = torch.full((rows, groups), numerics.default_zero, dtype=torch.uint8)
    if not numerics.symmetric:
        zeros = (_different(rows, groups, height) % 2**numerics.bits).to(torch.uint8)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    return QuantizedWeight(codes, scales, zeros, index, numerics.bits, numerics.code_type)


def _different(rows: int, groups: int, height: int) -> Tensor:
    """int64 [rows, groups] from 1 on, neighbours different, but alike in `height` rows."""
    return 1 + (torch.arange(rows) // height)[:, None] + torch.arange(groups)[None, :]
