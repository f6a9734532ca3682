"""8-bit weights and rows on the CPU: every unit of arithmetic this machine can run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit_kernels.act_quant.rows import RowQuantizer, Rows, join_rows, split_rows
from quantkit_kernels.code_types import CodeType, code_values
from quantkit_kernels.cpu.host import Product
from quantkit_kernels.scaled_mm import cpu, pack_scaled, reference_scaled_linear, scaled_linear
from quantkit_kernels.wna16 import QuantizedWeight
from tests.kernels.cpu_targets import (
    ARM,
    COOPERLAKE,
    HASWELL,
    NEOVERSE,
    SAPPHIRE_RAPIDS,
    assembly_for,
    kernel,
    loop_of,
)
from tests.kernels.scaled_mm_cases import (
    MAX_ERROR,
    ROW_CODE,
    random_codes,
    random_rows,
    random_scaled_weight,
    relative_error,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CODE_TYPES: list[CodeType] = ["int", "e4m3", "e5m2"]
ROWS = [1, 2, 3, 5, 6, 12, 13, 25, 70, 300]
"""On both sides of every switch: registers or tile, prefetch or not, one chunk or two."""


@pytest.fixture(params=["host", "bf16", "fma12", "fma2"])
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with each kind of kernel."""
    monkeypatch.setattr(cpu, "host_kernel", lambda product: kernel(product, request.param))
    return request.param


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Uninitialised memory, outputs and scratch alike, holds NaN."""
    torch.use_deterministic_algorithms(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def run(
    rows: Tensor,
    weight: QuantizedWeight,
    quantizer: RowQuantizer,
    dtype: torch.dtype = torch.float32,
    bias: Tensor | None = None,
) -> Tensor:
    return scaled_linear(rows, pack_scaled(weight, quantizer, dtype), dtype, bias)


def exact_integers(rows: Tensor, weight: QuantizedWeight, quantizer: RowQuantizer) -> Tensor:
    """sum_k (xq - zx) (code - zw) as int64 [M, N]."""
    parts = split_rows(rows, quantizer, weight.codes.shape[1])
    x = parts.codes.long() - parts.zeros.long()[:, None]
    return x @ (weight.codes.long() - weight.zeros.long()).T


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code_type", CODE_TYPES)
def test_every_row_count(code_type: CodeType, dtype: torch.dtype) -> None:
    weight = random_scaled_weight(100, 1040, code_type)
    quantizer = RowQuantizer(ROW_CODE[code_type])
    packed = pack_scaled(weight, quantizer, dtype)
    for count in ROWS:
        rows = random_rows(count, 1040, quantizer)
        y = scaled_linear(rows, packed, dtype)
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert relative_error(y, rows, weight, quantizer) <= MAX_ERROR[dtype], count


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("count", [1, 7, 30])
def test_integers_are_summed_exactly(symmetric: bool, zeros: bool, count: int) -> None:
    quantizer = RowQuantizer("int8", symmetric=symmetric, sum_group=3000 if zeros else 0)
    weight, rows = random_scaled_weight(64, 3000), random_rows(count, 3000, quantizer)
    if zeros:
        weight = replace(weight, zeros=random_codes("int", (64, 1), seed=2))
    parts = split_rows(rows, quantizer, 3000)
    whole = exact_integers(rows, weight, quantizer)
    expected = (whole.float() * weight.scales[:, 0]) * parts.scales
    # Rounding to float32 and two products may each be off by half a unit in the last place.
    torch.testing.assert_close(
        run(rows, weight, quantizer), expected, rtol=2 * torch.finfo(torch.float32).eps, atol=0
    )


@pytest.mark.usefixtures("unit")
def test_extreme_integers_do_not_overflow() -> None:
    quantizer = RowQuantizer("int8", symmetric=False)
    weight = random_scaled_weight(33, 65536)
    weight.codes[:16], weight.codes[16:] = 0, 255
    codes = torch.full((2, 65536), -128, dtype=torch.int8)
    codes[1] = 127
    rows = join_rows(Rows(codes, torch.ones(2, 1), torch.tensor([127.0, -128.0]), 65536))
    whole = exact_integers(rows, weight, quantizer)
    assert whole.abs().max() > 2**31 - 2**24
    expected = whole.float() * weight.scales[:, 0]
    torch.testing.assert_close(run(rows, weight, quantizer), expected, rtol=3e-7, atol=0)


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("code_type", ["e4m3", "e5m2"])
@pytest.mark.parametrize("group_size", [16, 48, 128])
@pytest.mark.parametrize("grouped_rows", [False, True])
def test_groups(code_type: CodeType, group_size: int, grouped_rows: bool) -> None:
    quantizer = RowQuantizer("e4m3", group_size) if grouped_rows else RowQuantizer("e4m3")
    weight = random_scaled_weight(70, 400, code_type, group_size)
    for count in (1, 40):
        rows = random_rows(count, 400, quantizer)
        y = run(rows, weight, quantizer)
        assert relative_error(y, rows, weight, quantizer) <= MAX_ERROR[torch.float32]


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("code_type", ["e4m3", "e5m2"])
@pytest.mark.parametrize("count", [1, 20])
def test_every_float8_code_has_its_value(code_type: CodeType, count: int) -> None:
    values = code_values(code_type)
    weight = random_scaled_weight(256, 16, code_type)
    weight.codes.copy_(torch.zeros(256, 16).byte())
    weight.codes[:, 3] = torch.arange(256).byte()
    weight.scales.fill_(1.0)
    x = torch.zeros(count, 16).to(torch.float8_e4m3fn)
    x[:, 3] = 1.0
    quantizer = RowQuantizer("e4m3")
    y = run(join_rows(Rows(x, torch.ones(count, 1), torch.zeros(count), 16)), weight, quantizer)
    assert torch.equal(y.nan_to_num(123.0), values.nan_to_num(123.0).expand(count, 256))


@pytest.mark.usefixtures("unit")
def test_every_row_code_has_its_value() -> None:
    weight = random_scaled_weight(16, 16, "e4m3")
    weight.codes.copy_(torch.eye(16).to(torch.float8_e4m3fn).view(torch.uint8))
    weight.scales.fill_(1.0)
    for code in (*range(0x7F), *range(0x80, 0xFF)):
        x = torch.zeros(1, 16, dtype=torch.uint8)
        x[0, code % 16] = code
        rows = join_rows(Rows(x.view(torch.float8_e4m3fn), torch.ones(1, 1), torch.zeros(1), 16))
        y = run(rows, weight, RowQuantizer("e4m3"))
        assert torch.equal(y, x.view(torch.float8_e4m3fn).float())


@pytest.mark.usefixtures("unit")
def test_a_row_that_is_no_number_spoils_no_other() -> None:
    weight, quantizer = random_scaled_weight(40, 64, "e4m3"), RowQuantizer("e4m3")
    for count in (2, 20):
        rows = random_rows(count, 64, quantizer)
        spoilt = rows.clone()
        spoilt[1, 5] = 0x7F
        y = run(spoilt, weight, quantizer)
        assert y[1].isnan().all()
        others = [i for i in range(count) if i != 1]
        assert torch.equal(y[others], run(rows, weight, quantizer)[others])


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 40),
    out_features=st.integers(1, 130),
    in_features=st.integers(1, 600),
    code_type=st.sampled_from(CODE_TYPES),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    unit=st.sampled_from(["host", "bf16", "fma2"]),
    seed=st.integers(0, 99),
)
def test_ragged_shapes(
    count: int,
    out_features: int,
    in_features: int,
    code_type: CodeType,
    symmetric: bool,
    dtype: torch.dtype,
    unit: str,
    seed: int,
) -> None:
    quantizer = RowQuantizer(ROW_CODE[code_type], symmetric=symmetric or code_type != "int")
    weight = random_scaled_weight(out_features, in_features, code_type, seed=seed)
    rows, bias = random_rows(count, in_features, quantizer, seed), torch.randn(out_features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "host_kernel", lambda product: kernel(product, unit))
        y = run(rows, weight, quantizer, dtype, bias)
    # Every element: one rounding of y, and float32 sums of all terms' magnitudes.
    expected = reference_scaled_linear(rows, weight, quantizer, bias)
    x = split_rows(rows, quantizer, in_features).dequantize()
    summed = x.abs() @ weight.dequantize().abs().T + bias.abs()
    rounding = torch.finfo(dtype).eps / 2 * expected.abs()
    assert ((y.float() - expected).abs() <= rounding + 1e-6 * summed + 1e-7).all()


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("code_type", CODE_TYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_bias_of_any_dtype(code_type: CodeType, bias_dtype: torch.dtype) -> None:
    weight, quantizer = random_scaled_weight(50, 128, code_type), RowQuantizer(ROW_CODE[code_type])
    rows, bias = random_rows(14, 128, quantizer), torch.randn(50).to(bias_dtype) * 1000
    y = run(rows, weight, quantizer, torch.float32, bias)
    assert relative_error(y, rows, weight, quantizer, bias) <= MAX_ERROR[torch.float32]


@pytest.mark.parametrize("code_type", CODE_TYPES)
def test_no_rows(code_type: CodeType) -> None:
    quantizer = RowQuantizer(ROW_CODE[code_type])
    weight = random_scaled_weight(50, 128, code_type)
    y = run(random_rows(0, 128, quantizer), weight, quantizer, torch.bfloat16)
    assert y.shape == (0, 50)
    assert y.dtype == torch.bfloat16


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("code_type", CODE_TYPES)
def test_rows_that_are_not_contiguous(code_type: CodeType) -> None:
    quantizer = RowQuantizer(ROW_CODE[code_type])
    weight = random_scaled_weight(64, 256, code_type)
    packed = pack_scaled(weight, quantizer, torch.float32)
    rows = random_rows(20, 256, quantizer)
    wide = torch.full((20, 2 * rows.shape[1]), 0xFF, dtype=torch.uint8)
    wide[:, 1 : rows.shape[1] + 1] = rows
    apart = torch.full((20, 2 * rows.shape[1]), 0xFF, dtype=torch.uint8)
    apart[:, ::2] = rows
    expected = scaled_linear(rows, packed, torch.float32)
    for shaped in (wide[:, 1 : rows.shape[1] + 1], apart[:, ::2], rows.t().contiguous().t()):
        assert torch.equal(scaled_linear(shaped, packed, torch.float32), expected)
    one = rows[:1].expand(20, -1)
    assert torch.equal(scaled_linear(one, packed, torch.float32), expected[:1].expand(20, -1))


def test_layout_is_as_documented() -> None:
    weight = random_scaled_weight(70, 1000)
    packed = pack_scaled(weight, RowQuantizer("int8"), torch.bfloat16)
    assert packed.codes.shape == (3, 256, 32)
    assert packed.scales.shape == (3, 1, 32)
    words = packed.codes.transpose(1, 2).flatten(0, 1)  # [96, K' / 4]
    codes = torch.empty(96, 1024, dtype=torch.uint8)
    for channel in range(4):
        pair, half = divmod(channel, 2)
        codes[:, channel::4] = ((words >> (8 * pair + 16 * half)) & 255).to(torch.uint8)
    assert torch.equal(codes[:70, :1000] ^ 128, weight.codes)
    assert not codes[70:].any()
    assert not codes[:, 1000:].any()
    assert packed.sums is not None
    sums = weight.codes.long().sub(128).sum(1)
    assert torch.equal(packed.sums.flatten()[:70].long(), sums)


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("code_type", CODE_TYPES)
@pytest.mark.parametrize("count", [1, 20, 300])
def test_results_do_not_depend_on_threads_or_time(code_type: CodeType, count: int) -> None:
    quantizer = RowQuantizer(ROW_CODE[code_type])
    weight = random_scaled_weight(256, 1024, code_type)
    packed = pack_scaled(weight, quantizer, torch.bfloat16)
    rows = random_rows(count, 1024, quantizer)
    expected = scaled_linear(rows, packed, torch.bfloat16)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        assert torch.equal(scaled_linear(rows, packed, torch.bfloat16), expected)


def test_concurrent_callers() -> None:
    quantizers = [RowQuantizer("int8"), RowQuantizer("e4m3")]
    weights = [random_scaled_weight(256, 512), random_scaled_weight(256, 512, "e4m3", 128)]
    pairs = zip(weights, quantizers, strict=True)
    packed = [pack_scaled(weight, quantizer, torch.bfloat16) for weight, quantizer in pairs]
    calls = [(random_rows(m, 512, w.quantizer), w, torch.bfloat16) for m in (1, 40) for w in packed]
    expected = [scaled_linear(*call) for call in calls]

    def caller(threads: int) -> bool:
        torch.set_num_threads(threads)
        return all(
            torch.equal(scaled_linear(*call), y)
            for _ in range(10)
            for call, y in zip(calls, expected, strict=True)
        )

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(caller, (1, 2, 2)))


def test_the_inner_loop_of_vnni_stays_in_registers() -> None:
    text = assembly_for(Product(8, "int", "int8"), COOPERLAKE)
    for rows in (1, 6, 12):
        loop = loop_of(f"multiply_packed_{rows}", text)
        assert loop.count("vpdpbusd") == 4 * 2 * rows
        assert "(%rsp" not in loop


def test_float8_weights_are_looked_up_in_registers() -> None:
    text = assembly_for(Product(8, "e4m3", "e4m3"), SAPPHIRE_RAPIDS)
    direct = loop_of("multiply_codes_1", text)
    # Two tables and two interleavings for each of two vectors.
    assert len(re.findall(r"vperm[it]2b", direct)) == 8
    assert direct.count("vdpbf16ps") == 4
    assert "(%rsp" not in direct
    assert "(%rsp" not in loop_of("multiply_codes_9", text)
    tile = loop_of("multiply_tile_12", text)
    assert tile.count("vdpbf16ps") == 4 * 2 * 12
    assert "(%rsp" not in tile


def test_old_and_other_processors_have_vector_code() -> None:
    for product in (Product(8, "int", "int8"), Product(8, "e5m2", "e4m3")):
        loop = loop_of("multiply_tile_2", assembly_for(product, HASWELL))
        assert len(re.findall(r"vfmadd\w+ps.*ymm", loop)) == 4 * 4 * 2
        assert "(%rsp" not in loop
        try:
            text = assembly_for(product, NEOVERSE, ARM)
        except RuntimeError as error:
            pytest.skip(f"this LLVM does not know ARM: {error}")
        assert "fmla\tv" in text
