"""Weights and launches of the CUDA backend, for its tests in Triton's interpreter."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.wna16 import QuantizedWeight, make_uniform, reference_linear
from quantkit_kernels.wna16 import triton as backend
from quantkit_kernels.wna16.triton_tiles import TileConfig
from quantkit_kernels.wna16.weights import PackedWeight
from tests.kernels.interpreted import error

FP16_ERROR = 2e-3
"""Relative to the norm of y: weights and y are each rounded to 11 bits, about 3e-4 in all."""

FP32_ERROR = 2e-6
"""Exact weights and fp32 sums, in another order than the reference's."""

ROUNDED = {torch.float16: 3e-4, torch.bfloat16: 3e-3}
"""Scaled weights rounded to 11 or 8 bits, and their scales before."""

GROUPS = (16, 32, 64, 128)


def int_weight(
    n: int,
    k: int,
    group: int,
    bits: int,
    *,
    symmetric: bool = False,
    shuffled: bool = False,
    whole_rows: bool = False,
) -> QuantizedWeight:
    """A random weight; asymmetric zeros span 0 .. 2**bits, as GPTQ's do, but fit in a byte.

    whole_rows: a row's groups are all scaled alike.
    """
    groups = -(-k // group)
    index = torch.arange(k) // group
    zeros = torch.randint(0, min(2**bits, 255) + 1, (n, groups))
    scales = (torch.rand(n, groups) * 0.02 + 0.005).half().float()
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    if whole_rows:
        zeros, scales = zeros[:, :1].expand(-1, groups), scales[:, :1].expand(-1, groups)
    return QuantizedWeight(
        codes=torch.randint(0, 2**bits, (n, k), dtype=torch.uint8),
        scales=scales,
        zeros=zeros.to(torch.uint8),
        group_index=(index[torch.randperm(k)] if shuffled else index).to(torch.int32),
        bits=bits,
    )


def packed(weight: QuantizedWeight, dtype: torch.dtype) -> PackedWeight:
    """Packed for CUDA."""
    return backend.pack(make_uniform(weight, backend.CONTAINERS), dtype)


def run(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """`linear` of the CUDA backend."""
    return backend.linear(
        x,
        weight.codes,
        weight.scales,
        weight.zeros,
        weight.gather,
        bias,
        weight.bits,
        weight.group_size,
        weight.in_features,
        weight.out_features,
        weight.code_type,
        weight.zero,
        residual,
    )


def run_tile(
    x: Tensor,
    weight: PackedWeight,
    tile: TileConfig,
    dtype: torch.dtype = torch.float32,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Like `run`, on one tile, with y in any dtype and memory around it that must stay NaN."""
    room = torch.empty(x.shape[0] + 2, weight.out_features, dtype=dtype)
    y = room[1:-1]
    kind = (weight.bits, weight.code_type, weight.group_size, weight.zero)
    operand = backend.Operand(weight.codes, weight.scales, *kind)
    backend.run_tiled(x, operand, bias, residual, y, tile)
    assert room[0].isnan().all()
    assert room[-1].isnan().all()
    return y


def check(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    limit: float,
    residual: Tensor | None = None,
) -> None:
    """`run` is as close to the reference as `limit`."""
    y = run(x, packed(weight, x.dtype), bias, residual)
    assert y.dtype == x.dtype
    expected = reference_linear(x, weight, bias)
    assert error(y, expected if residual is None else expected + residual.float()) <= limit
