"""The CUDA kernels of LLM.int8 without a GPU: interpreted."""

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
from quantkit_kernels.scaled_mm import triton as scaled_backend
from quantkit_kernels.scaled_mm.triton_tiles import ScaledTile
from quantkit_kernels.wna16 import QuantizedWeight
from tests.kernels.interpreted import (
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


def run(
    x: Tensor,
    weight: QuantizedWeight,
    outliers: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    packed = scaled_backend.pack(weight, ROWS, x.dtype)
    tensors = (packed.codes, packed.scales, packed.sums, outliers, bias, residual)
    return backend.linear(x, *tensors, 6.0, packed.in_features, packed.out_features)


def check(
    x: Tensor, weight: QuantizedWeight, outliers: Tensor | None = None, bias: Tensor | None = None
) -> None:
    residual = torch.randn(len(x), len(weight.codes), dtype=x.dtype)
    y = run(x, weight, outliers, bias, residual)
    assert y.dtype == x.dtype
    expected = reference_llm_int8(x, weight, 6.0, outliers, bias, residual)
    assert error(y, expected) <= ROUNDED[x.dtype]


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
    """With more than 32 outliers each of three splits adds a share of them."""
    x, weight = activations(5, 768, torch.float32, every=8), int8_weight(72, 768)
    packed, bias = scaled_backend.pack(weight, ROWS, x.dtype), torch.randn(72)
    parts = backend.split_input(x, backend.flag(x, 6.0, None))
    assert parts.count.item() > 64
    residual = torch.randn(5, 72)
    cut = ScaledTile(tile[0], tile[1], 128, 4, 4, splits, tile[2])
    room = torch.empty(7, 72)
    backend.run_tiled(parts, packed.codes, packed.scales, bias, residual, room[1:-1], cut)
    assert room[0].isnan().all()
    assert room[-1].isnan().all()
    expected = reference_llm_int8(x, weight, 6.0, bias=bias, residual=residual)
    assert error(room[1:-1], expected) <= FP32_ERROR


@interpreter
@in_interpreter
def test_no_tokens() -> None:
    assert run(torch.empty(0, 128), int8_weight(64, 128), None, None).shape == (0, 64)
