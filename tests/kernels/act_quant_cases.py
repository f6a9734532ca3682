"""Rows to test kernels with, and how far a kernel may be from the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.act_quant import (
    PER_TENSOR,
    RowQuantizer,
    join_rows,
    reference_add,
    reference_quantize,
    reference_rms_norm,
    reference_silu_mul,
    split_rows,
    sum_codes,
)
from quantkit_kernels.act_quant.source import Kind, Source

KINDS: tuple[Kind, ...] = ("x", "norm", "add_norm", "silu_mul")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (1, 7, 36, 200, 256, 4096)

DYNAMIC = (
    RowQuantizer("int8"),
    RowQuantizer("e4m3"),
    RowQuantizer("int8", symmetric=False),
    RowQuantizer("e4m3", 128),
    RowQuantizer("int8", 32),
    RowQuantizer("int8", PER_TENSOR),
    RowQuantizer("e4m3", PER_TENSOR),
    RowQuantizer("e4m3", upper_bound=1.5),
    RowQuantizer("int8", symmetric=False, upper_bound=1.5),
    RowQuantizer("int8", sum_group=32),
    RowQuantizer("int8", symmetric=False, sum_group=64),
    RowQuantizer("int8", 32, sum_group=4096),
    RowQuantizer("int8", PER_TENSOR, sum_group=16),
)
"""Every kind of dynamic scale."""

STATIC = (
    (RowQuantizer("int8", PER_TENSOR), torch.tensor([0.03]), None),
    (RowQuantizer("int8", PER_TENSOR, symmetric=False), torch.tensor([0.02]), torch.tensor([-7.0])),
    (RowQuantizer("e4m3", PER_TENSOR), torch.tensor([0.004]), None),
    (
        RowQuantizer("int8", PER_TENSOR, symmetric=False, sum_group=128),
        torch.tensor([0.02]),
        torch.tensor([5.0]),
    ),
)
"""Quantizer, scale and zero-point of static rows; some values lie outside their range."""

CASES = tuple((quantizer, None, None) for quantizer in DYNAMIC) + STATIC

SCALE_ERROR = 2e-6
"""Relative, of scales of norms and of SiLU: float32 sums and exponentials in another order."""

CODES_OFF = 2e-3
"""Share of codes that such a difference may move across a tie, to the code beside."""


def name(case: object) -> str:
    """A test id."""
    if isinstance(case, RowQuantizer):
        bound = f"-bound{case.upper_bound}" * (case.upper_bound < 1e9)
        sums = f"-sums{case.sum_group}" * (case.sum_group > 0)
        return f"{case.code}-{case.group_size}{'' if case.symmetric else '-asym'}{bound}{sums}"
    return "static" if isinstance(case, Tensor) else str(case)


def random_source(kind: Kind, rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Source:
    """Normal values with a few channels fifty times larger, as strided views where there may be."""
    generator = torch.Generator().manual_seed(seed)
    columns = 2 * width if kind == "silu_mul" else width
    x = torch.randn(rows, columns + 3, generator=generator)
    x[:, ::61] *= 50
    x = x.to(dtype)[:, 1 : 1 + columns]
    if kind in ("x", "silu_mul"):
        return Source(kind, x, width)
    weight = torch.randn(width, generator=generator).to(dtype)
    if kind == "norm":
        return Source(kind, x, width, weight, 1e-5)
    residual = torch.randn(rows, width + 5, generator=generator).to(dtype)[:, 2 : 2 + width]
    return Source(kind, x, width, weight, 1e-5, residual, torch.empty(rows, width, dtype=dtype))


def row_of(source: Source, row: int) -> Source:
    """One row by itself."""
    only = slice(row, row + 1)
    return source._replace(
        x=source.x[only],
        residual=None if source.residual is None else source.residual[only],
        total=None if source.total is None else torch.empty_like(source.total[only]),
    )


def values_of(source: Source) -> Tensor:
    """What is quantised, float32 [M, K]."""
    if source.kind == "silu_mul":
        return reference_silu_mul(source.x)
    x = source.x if source.residual is None else reference_add(source.x, source.residual)
    return x.float() if source.weight is None else reference_rms_norm(x, source.weight, 1e-5)


def check(
    rows: Tensor,
    source: Source,
    quantizer: RowQuantizer,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> None:
    """Rows are the reference's: every byte for plain x, else as near as float32 allows."""
    expected = join_rows(reference_quantize(values_of(source), quantizer, scale, zero))
    assert rows.shape == expected.shape
    assert rows.dtype == torch.uint8
    if source.kind == "x":
        assert torch.equal(rows, expected)
    else:
        check_near(rows, expected, quantizer, source.width)
    if source.residual is not None:
        assert torch.equal(source.total, reference_add(source.x, source.residual))


def check_near(rows: Tensor, expected: Tensor, quantizer: RowQuantizer, width: int) -> None:
    """Scales within SCALE_ERROR; values within a code's step, and nearly all equal; padding 0."""
    got, want = (split_rows(r, quantizer, width) for r in (rows, expected))
    torch.testing.assert_close(got.scales, want.scales, rtol=SCALE_ERROR, atol=0)
    values = want.dequantize()
    spread = want.scales.repeat_interleave(want.group_size, 1)[:, :width]
    step = spread if quantizer.code == "int8" else (values.abs() / 8).maximum(spread / 512)
    off = (got.dequantize() - values).abs() / step
    assert bool((off <= 1.01).all())
    assert int((off > 0.5).sum()) <= CODES_OFF * off.numel()
    layout = quantizer.layout(width)
    assert not rows[:, width : layout.scales_at].any()
    assert not rows[:, layout.end :].any()
    if got.sums is not None:
        assert torch.equal(got.sums, sum_codes(got.codes, quantizer.sum_group))
