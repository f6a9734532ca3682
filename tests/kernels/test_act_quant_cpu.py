"""The CPU kernel: every kind of row, on AVX-512 and on narrower vectors, against the reference."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quantkit_kernels.act_quant import (
    PER_TENSOR,
    RowQuantizer,
    cpu,
    join_rows,
    reference_quantize,
    split_rows,
)
from quantkit_kernels.act_quant.cpu_kernel import build_module
from quantkit_kernels.act_quant.cpu_values import Variant
from quantkit_kernels.act_quant.source import Kind, Source
from quantkit_kernels.cpu.native import Processor, assembly
from tests.kernels.act_quant_cases import (
    CASES,
    DTYPES,
    KINDS,
    WIDTHS,
    check,
    name,
    random_source,
    row_of,
)

HASWELL = Processor("haswell", "")
IS_X86 = platform.machine() == "x86_64"


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Uninitialised floats are NaN, uninitialised bytes 255; one thread."""
    torch.use_deterministic_algorithms(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def haswell(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels of vectors half as wide, without AVX-512."""
    if not IS_X86:
        pytest.skip("compiles for x86-64, which this machine is not")
    monkeypatch.setattr(cpu, "host_processor", lambda: HASWELL)
    monkeypatch.setattr(cpu, "_workers", {})
    cpu._plan.cache_clear()
    yield
    cpu._plan.cache_clear()


@pytest.mark.parametrize(("quantizer", "scale", "zero"), CASES, ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_references(
    kind: Kind, quantizer: RowQuantizer, scale: Tensor | None, zero: Tensor | None
) -> None:
    for width in WIDTHS:
        for rows, dtype in ((1, torch.bfloat16), (3, torch.bfloat16), (5, torch.float32)):
            source = random_source(kind, rows, width, dtype)
            check(cpu.quantise(source, quantizer, scale, zero), source, quantizer, scale, zero)


@pytest.mark.parametrize("rows", [0, 1, 3, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_rows(kind: Kind, dtype: torch.dtype, rows: int) -> None:
    source, quantizer = random_source(kind, rows, 200, dtype), RowQuantizer("int8")
    check(cpu.quantise(source, quantizer, None, None), source, quantizer)


@pytest.mark.usefixtures("haswell")
@pytest.mark.parametrize("quantizer", [RowQuantizer("e4m3"), RowQuantizer("int8", symmetric=False)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_without_avx512(kind: Kind, dtype: torch.dtype, quantizer: RowQuantizer) -> None:
    source = random_source(kind, 3, 100, dtype)
    check(cpu.quantise(source, quantizer, None, None), source, quantizer)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [7, 100, 4100])
def test_one_sum_of_a_row(width: int, symmetric: bool) -> None:
    quantizer = RowQuantizer("int8", symmetric=symmetric, sum_group=width)
    for kind in KINDS:
        source = random_source(kind, 3, width, torch.bfloat16)
        check(cpu.quantise(source, quantizer, None, None), source, quantizer)


@pytest.mark.usefixtures("haswell")
def test_sums_without_avx512() -> None:
    quantizer = RowQuantizer("int8", symmetric=False, sum_group=48)
    source = random_source("x", 3, 200, torch.bfloat16)
    check(cpu.quantise(source, quantizer, None, None), source, quantizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_alone_and_again(kind: Kind) -> None:
    source, quantizer = random_source(kind, 70, 1000, torch.bfloat16), RowQuantizer("int8")
    rows = cpu.quantise(source, quantizer, None, None)
    torch.set_num_threads(2)
    assert torch.equal(cpu.quantise(source, quantizer, None, None), rows)
    for i in (0, 1, 69):
        assert torch.equal(cpu.quantise(row_of(source, i), quantizer, None, None)[0], rows[i])


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_rows(kind: Kind, threads: int) -> None:
    torch.set_num_threads(threads)
    source, quantizer = random_source(kind, 70, 4096, torch.bfloat16), RowQuantizer("int8")
    check(cpu.quantise(source, quantizer, None, None), source, quantizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("code", ["e4m3", "int8"])
def test_every_16_bit_number(code: str, dtype: torch.dtype) -> None:
    """Ties, numbers that E4M3 has no exponent for, and all that saturate."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[x.isfinite()][None]
    quantizer = RowQuantizer(code, PER_TENSOR)
    for scale in (1.0, 0.75, 1 / 512):
        given = torch.tensor([scale])
        rows = cpu.quantise(Source("x", x, x.shape[1]), quantizer, given, None)
        assert torch.equal(rows, join_rows(reference_quantize(x, quantizer, given)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_of_float32_go_to_even(dtype: torch.dtype) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]]).to(dtype)
    quantizer = RowQuantizer("int8")
    rows = cpu.quantise(Source("x", x, 8), quantizer, None, None)
    assert split_rows(rows, quantizer, 8).codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_nan_in_a_residual_reaches_the_rows() -> None:
    source = random_source("add_norm", 2, 40, torch.bfloat16)
    source.residual[1, 39] = torch.nan
    rows = cpu.quantise(source, RowQuantizer("int8"), None, None)
    assert split_rows(rows, RowQuantizer("int8"), 40).scales.isnan().flatten().tolist() == [0, 1]
    assert source.total.isnan().nonzero().tolist() == [[1, 39]]


@pytest.mark.parametrize("limit", ["MAX_CHANNELS", "LANES"])
def test_rows_beyond_the_kernel_go_another_way(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_run", None)
    source, quantizer = random_source("x", 3, 200, torch.bfloat16), RowQuantizer("e4m3", 10)
    if limit == "MAX_CHANNELS":
        monkeypatch.setattr(cpu, limit, 199)
        quantizer = RowQuantizer("e4m3")
    check(cpu.quantise(source, quantizer, None, None), source, quantizer)


def test_a_weight_of_another_dtype() -> None:
    source = random_source("norm", 3, 100, torch.bfloat16)
    source = source._replace(weight=torch.randn(100))
    check(cpu.quantise(source, RowQuantizer("int8"), None, None), source, RowQuantizer("int8"))


@pytest.mark.parametrize("kind", KINDS)
def test_code_for_other_processors(kind: Kind) -> None:
    module = build_module(Variant(kind, "f16", "bf16", "e4m3", True))
    avx512 = assembly(module, Processor("skylake-avx512", ""), "x86_64-unknown-linux-gnu")
    avx2 = assembly(module, HASWELL, "x86_64-unknown-linux-gnu")
    neon = assembly(module, Processor("neoverse-n1", ""), "aarch64-unknown-linux-gnu")
    assert "zmm" in avx512
    assert "vcvtph2ps" in avx2
    assert "zmm" not in avx2
    assert "fcvtl" in neon
    # What the processor cannot do would be a call to a library that is not there.
    assert not re.search(r"^\s+(call|bl)\w*\s", avx512 + avx2 + neon, re.MULTILINE)
