"""The CPU backend: every unit of arithmetic this machine can run, against the reference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit_kernels.code_types import CodeType, code_values
from quantkit_kernels.cpu.host import Product
from quantkit_kernels.wna16 import QuantizedWeight, cpu, pack_weight, reference_linear, wna16_linear
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
from tests.kernels.wna16_cases import BITS, MAX_ERROR, random_inputs, random_weight, relative_error

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = [1, 2, 3, 5, 12, 13, 24, 25, 70, 300]
"""On both sides of every switch: registers or tile, input regrouped or not, one chunk or two."""


@pytest.fixture(params=["host", "fma12", "fma2"])
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


def run(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    return wna16_linear(x, pack_weight(weight, x.dtype), bias)


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_bit_width_and_row_count(dtype: torch.dtype, bits: int, symmetric: bool) -> None:
    weight = random_weight(100, 520, bits=bits, symmetric=symmetric)
    packed = pack_weight(weight, dtype)
    assert (packed.zeros is None) == symmetric
    for rows in ROWS:
        x = random_inputs(rows, 520, dtype=dtype)
        y = wna16_linear(x, packed)
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert relative_error(y, x, weight) <= MAX_ERROR[dtype], rows


CODE_TYPE_ERROR = {torch.bfloat16: 2.5e-3, torch.float16: 3e-4, torch.float32: 8e-6}
"""NF4's numbers are rounded to one bfloat16 where activations are, 7.1e-4, else to two, 2**-17.
E5M2's few large numbers make few large elements, whose rounding to bfloat16 counts for more.
"""


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("unit", ["host", "bf16", "fma12", "fma2"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code_type", BITS)
@pytest.mark.parametrize("group_size", [64, 520])
def test_every_code_type(dtype: torch.dtype, code_type: CodeType, group_size: int) -> None:
    bits = BITS[code_type]
    weight = random_weight(100, 520, bits=bits, code_type=code_type, group_size=group_size)
    weight = replace(weight, scales=weight.scales / code_values(code_type).nan_to_num(0, 1).max())
    packed = pack_weight(weight, dtype)
    assert packed.zeros is None
    limit = CODE_TYPE_ERROR[dtype]
    if dtype == torch.float32 and code_type != "nf4":
        limit = MAX_ERROR[dtype]
    for rows in (1, 2, 7, 12, 13, 40):
        x = random_inputs(rows, 520, dtype=dtype)
        assert relative_error(wna16_linear(x, packed), x, weight) <= limit, rows


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("unit", ["host", "bf16", "fma12", "fma2"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code_type", BITS)
@pytest.mark.parametrize("rows", [1, 20])
def test_every_code_has_its_value(dtype: torch.dtype, code_type: CodeType, rows: int) -> None:
    bits, values = BITS[code_type], code_values(code_type)
    weight = random_weight(2**bits, 16, bits=bits, code_type=code_type)
    weight.codes.zero_()
    weight.codes[:, 3] = torch.arange(2**bits)
    weight = replace(weight, scales=torch.ones_like(weight.scales))
    x = torch.zeros(rows, 16).to(dtype)
    x[:, 3] = 1
    # NF4 is rounded to one or two bfloat16; division by 12 may round the scale of FP4.
    rounding = {"nf4": 2**-8 if dtype == torch.bfloat16 else 2**-16, "fp4": 2**-23}
    y, expected = run(x, weight), values.to(dtype).expand(rows, -1)
    # The smaller pieces of an activation are 0 here, and 0 times infinity is no number.
    finite = expected.isfinite()
    assert not y[~finite].isfinite().any()
    rtol = rounding.get(code_type, 0.0) + (torch.finfo(dtype).eps if bits == 4 else 0)
    torch.testing.assert_close(y[finite], expected[finite], rtol=rtol, atol=0)


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 48, 1])
@pytest.mark.parametrize("act_order", [False, True])
def test_every_group_size_and_order(group_size: int, act_order: bool) -> None:
    weight = random_weight(64, 384, group_size=group_size, act_order=act_order)
    for rows in (1, 40):
        x = random_inputs(rows, 384, dtype=torch.float16)
        assert relative_error(run(x, weight), x, weight) <= MAX_ERROR[torch.float16]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    out_features=st.integers(1, 130),
    in_features=st.integers(1, 300),
    bits=st.sampled_from([3, 4, 8]),
    group_size=st.sampled_from([16, 50, 128]),
    dtype=st.sampled_from(DTYPES),
    unit=st.sampled_from(["host", "fma2"]),
    seed=st.integers(0, 99),
)
def test_ragged_shapes(
    rows: int,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    unit: str,
    seed: int,
) -> None:
    weight = random_weight(out_features, in_features, bits=bits, group_size=group_size, seed=seed)
    x = random_inputs(rows, in_features, dtype=dtype, seed=seed)
    bias = torch.randn(out_features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "host_kernel", lambda product: kernel(product, unit))
        y = run(x, weight, bias)
    # Every element: one rounding of y, and float32 sums of terms as large as x times all steps.
    expected = reference_linear(x, weight, bias)
    span = weight.scales[:, weight.group_index.long()] * 2**bits
    summed = x.float().abs() @ span.T + bias.abs()
    rounding = torch.finfo(dtype).eps / 2 * expected.abs()
    assert ((y.float() - expected).abs() <= rounding + 1e-6 * summed).all()


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_bias_of_any_dtype(dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    weight, bias = random_weight(50, 128), torch.randn(50).to(bias_dtype) * 100
    x = random_inputs(14, 128, dtype=dtype)
    assert relative_error(run(x, weight, bias), x, weight, bias) <= MAX_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype: torch.dtype) -> None:
    y = run(torch.randn(0, 128).to(dtype), random_weight(50, 128))
    assert y.shape == (0, 50)
    assert y.dtype == dtype


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_that_are_not_contiguous(dtype: torch.dtype) -> None:
    weight = random_weight(64, 256)
    wide = random_inputs(20, 512, dtype=dtype)
    odd_address = wide.flatten()[1:257].view(1, 256)
    for x in (wide[:, ::2], wide[::3, 256:], wide[:1, :256].expand(20, 256), odd_address):
        assert torch.equal(run(x, weight), run(x.clone(), weight))


def test_layout_is_as_documented() -> None:
    weight = random_weight(70, 256)
    packed = pack_weight(weight, torch.bfloat16)
    words = packed.codes.transpose(1, 2).flatten(0, 1)[:70]  # [N, K / 8]
    codes = torch.empty(70, 256, dtype=torch.uint8)
    for channel in range(8):
        pair, half = divmod(channel, 2)
        codes[:, channel::8] = ((words >> (4 * pair + 16 * half)) & 15).to(torch.uint8) ^ 8
    assert torch.equal(codes, weight.codes)
    assert packed.codes.shape == (3, 32, 32)
    assert packed.scales.shape == (3, 2, 32)


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_inputs(dtype: torch.dtype) -> None:
    weight = random_weight(32, 128, symmetric=True)
    weight = replace(weight, scales=torch.full_like(weight.scales, 1e-2))
    x = torch.zeros(16, 128).to(dtype)
    x[0, 0], x[1, 1], x[2, 2], x[3, 3] = float("inf"), float("nan"), -float("inf"), 1.0
    x[4, 4], x[5, 5] = min(torch.finfo(dtype).max, 1e36), torch.finfo(dtype).smallest_normal
    y = run(x, weight)
    expected = reference_linear(x, weight).to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("rows", [1, 20, 300])
def test_results_do_not_depend_on_threads_or_time(rows: int) -> None:
    packed = pack_weight(random_weight(256, 512), torch.bfloat16)
    x = random_inputs(rows, 512, dtype=torch.bfloat16)
    expected = wna16_linear(x, packed)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        assert torch.equal(wna16_linear(x, packed), expected)


def test_threads_are_those_of_pytorch() -> None:
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("counts threads in /proc")
    torch.set_num_threads(2)
    torch.randn(1 << 20).exp()  # starts PyTorch's own
    packed = pack_weight(random_weight(256, 512), torch.bfloat16)
    before = len(list(tasks.iterdir()))
    wna16_linear(random_inputs(20, 512, dtype=torch.bfloat16), packed)
    assert len(list(tasks.iterdir())) == before


@pytest.mark.parametrize("inner_threads", [1, 2])
def test_concurrent_callers(inner_threads: int) -> None:
    packed = [pack_weight(random_weight(256, 512, bits=b), torch.bfloat16) for b in (4, 8)]
    inputs = [random_inputs(rows, 512, dtype=torch.bfloat16) for rows in (1, 20, 40)]
    calls = [(x, weight) for x in inputs for weight in packed]
    expected = [wna16_linear(*call) for call in calls]

    def caller(_: int) -> bool:
        torch.set_num_threads(inner_threads)
        return all(
            torch.equal(wna16_linear(*call), y)
            for _ in range(10)
            for call, y in zip(calls, expected, strict=True)
        )

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(caller, range(3)))


def test_a_row_alone_is_a_row_among_others() -> None:
    packed = pack_weight(random_weight(96, 256), torch.bfloat16)
    x = random_inputs(8, 256, dtype=torch.bfloat16)
    torch.testing.assert_close(
        torch.cat([wna16_linear(row, packed) for row in x.split(1)]),
        wna16_linear(x, packed),
        rtol=2**-7,
        atol=1e-3,
    )


def test_the_inner_loop_of_avx512_stays_in_registers() -> None:
    text = assembly_for(Product(4), COOPERLAKE)
    for rows in (6, 12):
        loop = loop_of(f"multiply_tile_{rows}", text)
        assert loop.count("vdpbf16ps") == 4 * 2 * rows
        assert "(%rsp" not in loop
    direct = loop_of("multiply_codes_1", text)
    assert direct.count("vpermw") == 8
    assert "(%rsp" not in direct


def test_bytes_are_looked_up_in_registers() -> None:
    text = assembly_for(Product(8), SAPPHIRE_RAPIDS)
    # Four tables and two interleavings for each of two vectors.
    assert len(re.findall(r"vperm[it]2b", loop_of("multiply_codes_1", text))) == 12
    assert "(%rsp" not in loop_of("multiply_codes_8", text)


def test_the_inner_loop_of_avx2_stays_in_registers() -> None:
    loop = loop_of("multiply_tile_2", assembly_for(Product(4), HASWELL))
    assert len(re.findall(r"vfmadd\w+ps.*ymm", loop)) == 4 * 4 * 2
    assert "(%rsp" not in loop


def test_arm_has_vector_code() -> None:
    try:
        text = assembly_for(Product(4), NEOVERSE, ARM)
    except RuntimeError as error:
        pytest.skip(f"this LLVM does not know ARM: {error}")
    assert "fmla\tv" in text
