"""The CUDA kernels of LLM.int8 without a GPU: interpreted, and compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quantkit_kernels.act_quant import reference_quantize
from quantkit_kernels.act_quant.rows import join_rows
from quantkit_kernels.llm_int8 import reference_llm_int8
from quantkit_kernels.llm_int8 import triton as backend
from quantkit_kernels.llm_int8.reference import ROWS, outlier_mask
from quantkit_kernels.llm_int8.triton_kernels import flag_outliers, llm_int8_gemm, quantise_rest
from quantkit_kernels.scaled_mm import triton as scaled_backend
from quantkit_kernels.scaled_mm.triton_tiles import ScaledTile, select_scaled_tile
from quantkit_kernels.tuning import Device
from quantkit_kernels.wna16 import QuantizedWeight
from tests.kernels.aot import DEVICES, compile_kernel
from tests.kernels.interpreted import (
    INTERPRETED,
    error,
    in_interpreter,
    interpreter,
    run_in_interpreter,
    starts_the_interpreter,
)
from tests.kernels.wna16_cases import random_weight

FP32_ERROR = 2e-6
"""The same codes as the reference's, exact products, sums in another order."""

ROUNDED = {torch.float16: 3e-4, torch.float32: FP32_ERROR}
"""y rounded to 11 bits: 2.1e-4."""


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Uninitialised floats are NaN, uninitialised bytes 255."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@interpreter
@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


def int8_weight(n: int, k: int) -> QuantizedWeight:
    return random_weight(n, k, bits=8, group_size=k, symmetric=True)


def activations(m: int, k: int, dtype: torch.dtype, every: int = 50) -> Tensor:
    """Normal values below 6, but for every 50th channel, of which one token is 60 times larger."""
    x = torch.randn(m, k).clamp(-3, 3)
    x[m // 2, ::every] *= 60
    return x.to(dtype)


def run(x: Tensor, weight: QuantizedWeight, outliers: Tensor | None, bias: Tensor | None) -> Tensor:
    packed = scaled_backend.pack(weight, ROWS, x.dtype)
    tensors = (packed.codes, packed.scales, packed.sums, outliers, bias)
    return backend.linear(x, *tensors, 6.0, packed.in_features, packed.out_features)


def check(
    x: Tensor, weight: QuantizedWeight, outliers: Tensor | None = None, bias: Tensor | None = None
) -> None:
    y = run(x, weight, outliers, bias)
    assert y.dtype == x.dtype
    assert error(y, reference_llm_int8(x, weight, 6.0, outliers, bias)) <= ROUNDED[x.dtype]


@interpreter
@in_interpreter
@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 7), (72, 200), (130, 256), (40, 4200)])
def test_ragged_shapes(n: int, k: int, dtype: torch.dtype) -> None:
    for m in (1, 5):
        check(activations(m, k, dtype), int8_weight(n, k), bias=torch.randn(n))


@interpreter
@in_interpreter
@pytest.mark.parametrize("m", [17, 65, 130])
def test_many_tokens(m: int) -> None:
    check(activations(m, 300, torch.float16), int8_weight(72, 300))


@interpreter
@in_interpreter
def test_given_outliers() -> None:
    x, weight = activations(5, 600, torch.float32), int8_weight(72, 600)
    for outliers in ([], [599], [0, 7, 128, 300], range(0, 600, 2)):
        check(x, weight, torch.tensor(list(outliers), dtype=torch.int32))


@interpreter
@in_interpreter
def test_every_channel_may_be_an_outlier() -> None:
    x, weight = torch.randn(4, 100) + 20, int8_weight(64, 100)
    y = run(x, weight, None, None)
    assert error(y, x @ weight.dequantize().T) <= FP32_ERROR


@interpreter
@in_interpreter
def test_rows_and_outliers_are_the_references() -> None:
    for k in (7, 200, 5000):
        x = activations(5, k, torch.float16)
        flags = backend.flag(x, 6.0, None)
        mask = outlier_mask(x, 6.0, None)
        assert torch.equal(flags, mask.int())
        parts = backend.split_input(x, flags)
        assert parts.count.item() == mask.sum()
        assert torch.equal(parts.outliers[: parts.count].long(), mask.nonzero()[:, 0])
        expected = join_rows(reference_quantize(x.masked_fill(mask, 0), ROWS))
        assert torch.equal(parts.rows, expected)


@interpreter
@in_interpreter
def test_a_token_that_is_no_number_stays_alone() -> None:
    x, weight = activations(3, 200, torch.float32), int8_weight(40, 200)
    x[1, 3] = torch.nan
    y = run(x, weight, None, None)
    assert y[1].isnan().all()
    expected = reference_llm_int8(x, weight, 6.0)
    assert error(y[::2], expected[::2]) <= FP32_ERROR


@interpreter
@in_interpreter
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("tile", [(16, 64, True), (128, 128, False)], ids=["swap", "plain"])
def test_splits_agree(tile: tuple[int, int, bool], splits: int) -> None:
    """With more than 64 outliers each of three splits adds a share of them."""
    x, weight = activations(5, 768, torch.float32, every=8), int8_weight(72, 768)
    packed, bias = scaled_backend.pack(weight, ROWS, x.dtype), torch.randn(72)
    parts = backend.split_input(x, backend.flag(x, 6.0, None))
    assert parts.count.item() > 64
    cut = ScaledTile(tile[0], tile[1], 128, 4, 4, splits, tile[2])
    room = torch.empty(7, 72)
    backend.run_tiled(parts, packed.codes, packed.scales, bias, room[1:-1], cut)
    assert room[0].isnan().all()
    assert room[-1].isnan().all()
    assert error(room[1:-1], reference_llm_int8(x, weight, 6.0, bias=bias)) <= FP32_ERROR


@interpreter
@in_interpreter
def test_no_tokens() -> None:
    assert run(torch.empty(0, 128), int8_weight(64, 128), None, None).shape == (0, 64)


@pytest.mark.aot
@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 turns the compiler off")
@pytest.mark.parametrize(
    ("device", "m"),
    [*zip(DEVICES, (4096, 1, 1, 4096), strict=True), (DEVICES[2], 4096)],
    ids=lambda value: f"sm{value.capability}" if isinstance(value, Device) else str(value),
)
def test_product_compiles_without_spills(device: Device, m: int) -> None:
    tile = select_scaled_tile(m, 8192, 8192, 128, False, device)
    element = "*fp16" if m == 1 else "*bf16"
    types = {
        "rows_ptr": "*i8",
        "row_scales_ptr": "*fp32",
        "x_ptr": element,
        "codes_ptr": "*i8",
        "w_scales_ptr": "*fp32",
        "outliers_ptr": "*i32",
        "count_ptr": "*i32",
        "bias_ptr": element,
        "out_ptr": element,
        **dict.fromkeys(("N", "K", "row_stride", "w_stride"), "i32"),
    }
    compiled = compile_kernel(
        llm_int8_gemm,
        types=types | dict.fromkeys(("M", "k_steps", "split_steps"), "i32"),
        constants={
            "SCALES_AT": 2048,
            "RAGGED": False,
            "SWAP": tile.swap,
            "BM": tile.block_m,
            "BN": tile.block_n,
            "BK": tile.block_k,
            "STAGES": tile.stages,
            "ASM": True,
        },
        aligned=tuple(types),
        arch=device.capability,
        warps=tile.warps,
    )
    assert compiled.stack == 0
    assert compiled.local == 0
    assert compiled.shared <= device.shared_bytes
    integer = {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "UTCIMMA"}[device.capability]
    half = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[device.capability]
    assert compiled.opcodes[integer] > 0
    assert compiled.opcodes[half] > 0


@pytest.mark.aot
@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 turns the compiler off")
def test_preparation_compiles_without_spills() -> None:
    flags = compile_kernel(
        flag_outliers,
        types={"x_ptr": "*bf16", "flags_ptr": "*i32", "M": "i32", "K": "i32", "threshold": "fp32"},
        constants={"BM": backend.FLAG_TOKENS, "BK": backend.FLAG_COLUMNS},
        aligned=("x_ptr", "flags_ptr", "K"),
        arch=90,
        warps=4,
    )
    pointers = {
        "x_ptr": "*bf16",
        "flags_ptr": "*i32",
        "rows_ptr": "*u8",
        "words_ptr": "*fp32",
        "outliers_ptr": "*i32",
        "count_ptr": "*i32",
    }
    rows = compile_kernel(
        quantise_rest,
        types=pointers | {"K": "i32", "row_stride": "i32"},
        constants={"BLOCK": backend.QUANTISE_BLOCK},
        aligned=(*pointers, "K", "row_stride"),
        arch=80,
        warps=backend.QUANTISE_WARPS,
    )
    assert flags.stack == rows.stack == flags.local == rows.local == 0
