"""LLM.int8: the op, its CPU and generic backends, and what it is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantkit_kernels.act_quant import RowQuantizer, reference_quantize
from quantkit_kernels.llm_int8 import (
    LlmInt8Weight,
    cpu,
    generic,
    llm_int8_linear,
    pack_llm_int8,
    reference_llm_int8,
)
from quantkit_kernels.scaled_mm import generic as scaled_generic
from quantkit_kernels.wna16 import QuantizedWeight
from tests.kernels.wna16_cases import random_weight

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_ERROR = {dtype: torch.finfo(dtype).eps / 2 + 2e-6 for dtype in DTYPES}
"""Frobenius norm of the error over that of y: y is rounded once, and sums have another order."""

SHAPES = ((1, 1), (7, 33), (36, 20), (200, 64), (256, 100), (4096, 40))
"""K and N."""


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Uninitialised floats are NaN, uninitialised bytes 255; one thread."""
    torch.use_deterministic_algorithms(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def int8_weight(out_features: int, in_features: int) -> QuantizedWeight:
    return random_weight(out_features, in_features, bits=8, group_size=in_features, symmetric=True)


def activations(rows: int, width: int, dtype: torch.dtype, factor: float = 60.0) -> Tensor:
    """Normal values below 6, but for every 50th channel, which is `factor` times larger."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).clamp(-3, 3)
    x[:, ::50] *= factor
    return x.to(dtype)


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.float() - expected).norm() / expected.norm())


def arguments(
    x: Tensor, packed: LlmInt8Weight, outliers: Tensor | None, bias: Tensor | None
) -> tuple[object, ...]:
    sizes = packed.in_features, packed.out_features
    return (x, packed.codes, packed.scales, packed.sums, outliers, bias, 6.0, *sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "outputs"), SHAPES)
def test_op_matches_reference(width: int, outputs: int, dtype: torch.dtype) -> None:
    weight, bias = int8_weight(outputs, width), torch.randn(outputs)
    packed = pack_llm_int8(weight, dtype)
    for rows in (1, 3, 64):
        x = activations(rows, width, dtype)
        for outliers in (None, torch.tensor([0]), torch.arange(0, width, 50)[:9]):
            given = None if outliers is None else outliers.int()
            residual = torch.randn(rows, outputs, dtype=dtype)
            y = llm_int8_linear(x, packed, 6.0, given, bias, residual)
            assert y.dtype == dtype
            expected = reference_llm_int8(x, weight, 6.0, given, bias, residual)
            assert error(y, expected) <= MAX_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 60.0])
def test_generic_backend_matches_reference(factor: float, dtype: torch.dtype) -> None:
    weight, bias = int8_weight(33, 200), torch.randn(33)
    packed = scaled_generic.pack(weight, RowQuantizer("int8"), dtype)
    x = activations(5, 200, dtype, factor)
    for outliers in (None, torch.tensor([3, 199], dtype=torch.int32)):
        inputs = (x, packed.codes, packed.scales, packed.sums, outliers, bias, None, 6.0, 200, 33)
        expected = reference_llm_int8(x, weight, 6.0, outliers, bias)
        assert error(generic.linear(*inputs), expected) <= MAX_ERROR[dtype]


def test_outliers_keep_their_precision() -> None:
    """What the method is for: 60 times larger channels take the int8 range from all others."""
    weight, x = int8_weight(256, 512), activations(16, 512, torch.float32)
    exact = x @ weight.dequantize().T
    plain = reference_quantize(x, RowQuantizer("int8")).dequantize() @ weight.dequantize().T
    packed = pack_llm_int8(weight, torch.float32)
    assert error(plain, exact) > 0.03
    assert error(llm_int8_linear(x, packed, 6.0), exact) < 0.01
    static = torch.arange(0, 512, 50, dtype=torch.int32)
    assert error(llm_int8_linear(x, packed, 6.0, static), exact) < 0.01


def test_without_outliers_it_is_plain_int8() -> None:
    weight, x = int8_weight(64, 200), activations(4, 200, torch.float32, factor=1.0)
    packed = pack_llm_int8(weight, torch.float32)
    rest = reference_quantize(x, RowQuantizer("int8")).dequantize()
    expected = rest @ weight.dequantize().T
    none = torch.empty(0, dtype=torch.int32)
    for y in (llm_int8_linear(x, packed, 6.0), llm_int8_linear(x, packed, 0.1, none)):
        assert error(y, expected) <= MAX_ERROR[torch.float32]


def test_every_channel_may_be_an_outlier() -> None:
    weight, x = int8_weight(64, 100), torch.randn(4, 100) + 3
    y = llm_int8_linear(x, pack_llm_int8(weight, torch.float32), 1e-3)
    assert error(y, x @ weight.dequantize().T) <= MAX_ERROR[torch.float32]


def test_outlier_columns_are_found_in_the_panels() -> None:
    weight = int8_weight(70, 300)
    packed = pack_llm_int8(weight, torch.float32)
    columns = torch.tensor([299, 0, 1, 2, 3, 130])
    found = cpu.outlier_product(torch.eye(300), packed.codes, packed.scales, columns)[:, :70]
    expected = torch.zeros(300, 70)
    expected[columns] = weight.dequantize()[:, columns].T
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("channel", [50, 7])
@pytest.mark.parametrize("static", [False, True])
def test_a_nan_spoils_its_own_row_only(static: bool, channel: int, poison: float) -> None:
    weight, x = int8_weight(64, 200), activations(3, 200, torch.float32)
    outliers = torch.arange(0, 200, 50, dtype=torch.int32) if static else None
    packed = pack_llm_int8(weight, torch.float32)
    x[1, channel] = poison
    y = llm_int8_linear(x, packed, 6.0, outliers)
    assert not y[1].isfinite().any()
    expected = reference_llm_int8(x, weight, 6.0, outliers)[::2]
    assert error(y[::2], expected) <= MAX_ERROR[torch.float32]


def test_any_layout_of_x() -> None:
    weight = int8_weight(64, 100)
    packed = pack_llm_int8(weight, torch.float32)
    x = activations(6, 100, torch.float32)
    y = llm_int8_linear(x, packed, 6.0)
    assert torch.equal(llm_int8_linear(x.T.contiguous().T, packed, 6.0), y)
    assert torch.equal(llm_int8_linear(x.view(2, 3, 100), packed, 6.0).flatten(0, 1), y)
    assert llm_int8_linear(x[:0], packed, 6.0).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    packed, bias = pack_llm_int8(int8_weight(48, 96), dtype), torch.randn(48, dtype=dtype)
    outliers = torch.tensor([1, 5], dtype=torch.int32)
    for x, given in ((torch.randn(5, 96), None), (torch.randn(2, 3, 96), outliers)):
        torch.library.opcheck(
            torch.ops.quantkit.llm_int8_linear.default,
            arguments(x.to(dtype), packed, given, bias),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


def test_op_compiles_without_graph_breaks() -> None:
    packed = pack_llm_int8(int8_weight(32, 64), torch.float32)

    def twice(x: Tensor) -> Tensor:
        return llm_int8_linear(x, packed, 6.0) * 2

    x = activations(3, 64, torch.float32)
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), twice(x))


def test_nbytes_is_close_to_the_bytes() -> None:
    packed = pack_llm_int8(int8_weight(1024, 1024), torch.bfloat16)
    assert 1024 * 1024 < packed.nbytes <= 1024 * (1024 + 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 63)}, "x has 63 channels, but the weight takes 64"),
        ({"x": torch.randn(2, 64).double()}, "activations of torch.float64 are not served"),
        ({"bias": torch.randn(31)}, r"bias has shape \(31,\), expected \(32,\)"),
        ({"outliers": torch.tensor([1])}, "outliers are torch.int64 with 1 dimensions"),
        ({"threshold": 0.0}, "threshold is 0.0; it must be positive"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    packed = pack_llm_int8(int8_weight(32, 64), torch.float32)
    inputs = {"x": torch.randn(2, 64), "weight": packed, "threshold": 6.0} | change
    with pytest.raises(ValueError, match=message):
        llm_int8_linear(**inputs)


def test_pack_refusals() -> None:
    weight = int8_weight(32, 64)
    with pytest.raises(ValueError, match=r"activations of torch\.float64 are not served"):
        pack_llm_int8(weight, torch.float64)
    with pytest.raises(ValueError, match=r"the weight has 4-bit 'int' codes with 1 scales"):
        pack_llm_int8(replace(weight, bits=4), torch.float32)
    with pytest.raises(ValueError, match="zero-points other than 128"):
        pack_llm_int8(replace(weight, zeros=weight.zeros + 1), torch.float32)
