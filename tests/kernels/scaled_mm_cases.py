"""8-bit weights and rows to test kernels with, and how far a kernel may be from the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.act_quant.rows import RowCode, RowQuantizer, Rows, join_rows, sum_codes
from quantkit_kernels.code_types import CodeType, code_values
from quantkit_kernels.scaled_mm import reference_scaled_linear
from quantkit_kernels.wna16 import QuantizedWeight

MAX_ERROR = {torch.bfloat16: 2.5e-3, torch.float16: 3e-4, torch.float32: 2e-6}
"""Frobenius norm of the error over that of y, by dtype of y.

bfloat16: y rounded to 8 bits, 1.7e-3 on average, more where few elements are large. float16: y
rounded to 11 bits, 2.1e-4. float32: sums in another order than the reference's, or exact ones.
Codes are never rounded.
"""

LARGEST_SCALE: dict[CodeType, float] = {"int": 0.02, "e4m3": 2e-3, "e5m2": 1e-5}
"""Results stay within float16."""

ROW_CODE: dict[CodeType, RowCode] = {"int": "int8", "e4m3": "e4m3", "e5m2": "e4m3"}
"""Code type of weights to that of the rows they multiply."""


def random_codes(code_type: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """uint8, all codes with a finite value."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    if code_type in ("int", "int8"):
        return codes
    finite = code_values(code_type).isfinite()[codes.long()]  # type: ignore[arg-type]
    return codes.where(finite, codes & 0x8F)


def random_scaled_weight(
    out_features: int,
    in_features: int,
    code_type: CodeType = "int",
    group_size: int | None = None,
    seed: int = 0,
) -> QuantizedWeight:
    """One scale per output channel, or groups of which the last may be short."""
    size = group_size or in_features
    groups = -(-in_features // size)
    generator = torch.Generator().manual_seed(seed)
    return QuantizedWeight(
        codes=random_codes(code_type, (out_features, in_features), seed),
        scales=torch.rand(out_features, groups, generator=generator).add(0.1)
        * LARGEST_SCALE[code_type],
        zeros=torch.full((out_features, groups), 128, dtype=torch.uint8),
        group_index=(torch.arange(in_features) // size).int(),
        bits=8,
        code_type=code_type,
    )


def random_rows(count: int, in_features: int, quantizer: RowQuantizer, seed: int = 1) -> Tensor:
    """Rows of any finite codes; scales between 0.1 and 1, and zero-points where there are any."""
    generator = torch.Generator().manual_seed(seed)
    layout = quantizer.layout(in_features)
    codes = random_codes(quantizer.code, (count, in_features), seed)
    zeros = torch.randint(-128, 128, (count,), generator=generator).float()
    group_size = quantizer.group_size if quantizer.group_size > 0 else in_features
    scales = torch.rand(count, layout.groups, generator=generator) * 0.9 + 0.1
    zeros = torch.zeros(count) if quantizer.symmetric else zeros
    sums = sum_codes(codes.view(torch.int8), quantizer.sum_group) if layout.sums else None
    return join_rows(Rows(codes, scales, zeros, group_size, sums))


def relative_error(
    y: Tensor,
    rows: Tensor,
    weight: QuantizedWeight,
    quantizer: RowQuantizer,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> float:
    """Norm of y - reference over the norm of the reference."""
    expected = reference_scaled_linear(rows, weight, quantizer, bias, residual)
    assert y.shape == expected.shape
    return float((y.float() - expected).norm() / expected.norm())
