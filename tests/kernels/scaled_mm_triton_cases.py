"""8-bit weights and rows for the Triton kernels on CUDA, and how far they may be off."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.act_quant.rows import RowQuantizer, Rows, join_rows, sum_codes
from quantkit_kernels.scaled_mm import ScaledWeight, reference_scaled_linear
from quantkit_kernels.scaled_mm import triton as backend
from quantkit_kernels.scaled_mm.triton_launch import Operands, run_tiled
from quantkit_kernels.scaled_mm.triton_tiles import ScaledTile
from quantkit_kernels.wna16 import QuantizedWeight
from tests.kernels.interpreted import error

FP32_ERROR = 2e-6
"""Exact products and fp32 sums, in another order than the reference's."""

NAN = {"e4m3": 0x7F, "e5m2": 0x7C}
"""The first magnitude that is no number."""

INT8_ROWS = RowQuantizer("int8")
ASYMMETRIC_ROWS = RowQuantizer("int8", symmetric=False)
FP8_ROWS = RowQuantizer("e4m3")


def random_codes(code: str, *shape: int) -> Tensor:
    """uint8 bits of all numbers of a type."""
    if code in NAN:
        magnitudes = torch.randint(0, NAN[code], shape, dtype=torch.uint8)
        return magnitudes | torch.randint(0, 2, shape, dtype=torch.uint8) << 7
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def random_weight(
    code_type: str,
    n: int,
    k: int,
    group: int | None = None,
    *,
    blocks: bool = False,
    symmetric: bool = True,
) -> QuantizedWeight:
    """One scale per channel, or per group; those of 128 channels are the same where `blocks`."""
    index = torch.arange(k) // (group or k)
    groups = int(index[-1]) + 1
    scales = torch.rand(n, groups) * 0.02 + 0.005
    zeros = torch.full((n, groups), 128 * (code_type == "int"), dtype=torch.uint8)
    return QuantizedWeight(
        codes=random_codes(code_type, n, k),
        scales=scales[torch.arange(n) // 128 * 128] if blocks else scales,
        zeros=zeros if symmetric else random_codes("int", n, groups),
        group_index=index.int(),
        bits=8,
        code_type=code_type,
    )


def random_rows(quantizer: RowQuantizer, m: int, k: int) -> Tensor:
    """Rows whose bytes between the parts are those of a NaN."""
    layout = quantizer.layout(k)
    codes = random_codes(quantizer.code, m, k)
    group_size = quantizer.group_size if quantizer.group_size > 0 else k
    zeros = torch.zeros(m) if quantizer.symmetric else torch.randint(-128, 128, (m,)).float()
    sums = sum_codes(codes.view(torch.int8), quantizer.sum_group) if layout.sums else None
    rows = join_rows(Rows(codes, torch.rand(m, layout.groups) + 0.1, zeros, group_size, sums))
    rows[:, k : layout.scales_at] = 0xFF
    rows[:, layout.end :] = 0xFF
    return rows


def run(
    rows: Tensor,
    packed: ScaledWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    return backend.linear(
        rows,
        packed.codes,
        packed.scales,
        packed.sums,
        packed.zeros,
        bias,
        residual,
        packed.code_type,
        packed.quantizer.code,
        packed.quantizer.group_size,
        packed.group_size,
        packed.in_features,
        packed.out_features,
        dtype,
    )


def operands(
    rows: Tensor, packed: ScaledWeight, bias: Tensor | None, residual: Tensor | None
) -> Operands:
    return Operands(
        rows=rows,
        codes=packed.codes,
        scales=packed.scales,
        sums=packed.sums,
        zeros=packed.zeros,
        bias=bias,
        residual=residual,
        quantizer=packed.quantizer,
        groups=backend.kernel_groups(packed.quantizer, packed.in_features, packed.group_size),
        in_features=packed.in_features,
    )


def check(
    m: int,
    weight: QuantizedWeight,
    quantizer: RowQuantizer,
    bias: Tensor | None = None,
    tile: ScaledTile | None = None,
) -> None:
    """Against the reference: cut as `tile` says, or as the heuristic does."""
    n, k = weight.codes.shape
    packed = backend.pack(weight, quantizer, torch.float32)
    rows, residual = random_rows(packed.quantizer, m, k), torch.randn(m, n) * 100
    expected = reference_scaled_linear(rows, weight, packed.quantizer, bias, residual)
    if tile is None:
        y = run(rows, packed, bias, torch.float32, residual)
    else:
        y = torch.empty(m, n)
        run_tiled(operands(rows, packed, bias, residual), y, tile)
    assert error(y, expected) <= FP32_ERROR
