"""The activation ops: what every device has in common, and their reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit_kernels.act_quant import (
    PER_TENSOR,
    RowQuantizer,
    add_rms_norm_quantize,
    generic,
    join_rows,
    quantize_rows,
    reference_quantize,
    rms_norm_quantize,
    silu_mul_quantize,
    split_rows,
)
from quantkit_kernels.act_quant.source import Kind
from tests.kernels.act_quant_cases import (
    CASES,
    DTYPES,
    DYNAMIC,
    KINDS,
    STATIC,
    check,
    name,
    random_source,
    values_of,
)

INT8, E4M3 = RowQuantizer("int8"), RowQuantizer("e4m3")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Uninitialised floats are NaN, uninitialised bytes 255."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("quantizer", "scale", "zero"), CASES, ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_generic_backend_is_the_reference(
    kind: Kind, quantizer: RowQuantizer, scale: Tensor | None, zero: Tensor | None
) -> None:
    for rows, width in ((0, 36), (3, 200)):
        source = random_source(kind, rows, width, torch.bfloat16)
        check(generic.quantise(source, quantizer, scale, zero), source, quantizer, scale, zero)


def arguments(quantizer: RowQuantizer, *static: Tensor | None) -> tuple[object, ...]:
    scale, zero = static or (None, None)
    return (scale, zero, *astuple(quantizer))


@pytest.mark.parametrize(("quantizer", "scale", "zero"), CASES, ids=name)
def test_opcheck(quantizer: RowQuantizer, scale: Tensor | None, zero: Tensor | None) -> None:
    ops, how = torch.ops.quantkit, arguments(quantizer, scale, zero)
    weight = torch.randn(48)
    for shape in ((3, 48), (0, 48), (2, 2, 48)):
        x = torch.randn(shape)
        for op, inputs in (
            (ops.quantize_rows, (x,)),
            (ops.rms_norm_quantize, (x, weight, 1e-5)),
            (ops.add_rms_norm_quantize, (x, x.clone(), weight, 1e-5)),
            (ops.silu_mul_quantize, (x,)),
        ):
            torch.library.opcheck(
                op.default,
                (*inputs, *how),
                test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
            )


def test_a_block_compiles_without_graph_breaks() -> None:
    weight = torch.randn(64).bfloat16()

    def block(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, residual = add_rms_norm_quantize(x, residual, weight, 1e-6, INT8)
        gated = silu_mul_quantize(residual, E4M3)
        return rows, gated, quantize_rows(rms_norm_quantize(x, weight, 1e-6, INT8).half(), INT8)

    inputs = torch.randn(5, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 2):
        got = compiled(*(t[:rows] for t in inputs))
        assert all(map(torch.equal, got, block(*(t[:rows] for t in inputs))))


def test_leading_dimensions_stay() -> None:
    x, weight = torch.randn(2, 3, 40), torch.randn(40)
    rows = quantize_rows(x, INT8)
    assert rows.shape == (2, 3, INT8.layout(40).stride)
    assert torch.equal(rows.flatten(0, 1), quantize_rows(x.flatten(0, 1), INT8))
    normed, total = add_rms_norm_quantize(x, x, weight, 1e-5, INT8)
    assert normed.shape == rows.shape
    assert torch.equal(total, 2 * x)
    assert silu_mul_quantize(x, INT8).shape == (2, 3, INT8.layout(20).stride)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_need_not_be_contiguous(dtype: torch.dtype) -> None:
    x = torch.randn(40, 6).to(dtype).T
    assert torch.equal(quantize_rows(x, INT8), quantize_rows(x.contiguous(), INT8))


def test_written_out_rows() -> None:
    x = torch.tensor([[127.0, -1.5, 2.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    parts = split_rows(quantize_rows(x, INT8), INT8, 4)
    assert parts.codes.tolist() == [[127, -2, 2, 0], [0, 0, 0, 0]]
    assert parts.scales.flatten().tolist() == [1.0, 2.0**-126]
    asymmetric = RowQuantizer("int8", symmetric=False)
    parts = split_rows(quantize_rows(x + 128, asymmetric), asymmetric, 4)
    assert parts.scales[0].tolist() == [1.0]
    assert parts.zeros.tolist() == [-128.0, -128.0]
    assert parts.codes[0].tolist() == [127, -2, 2, 0]
    parts = split_rows(quantize_rows(x * 448 / 127, E4M3), E4M3, 4)
    assert parts.codes[0].float().tolist() == [448.0, -5.5, 9.0, 0.0]


def test_written_out_sums() -> None:
    x = torch.tensor([[127.0, -1.0, 2.0, 0.0] * 6])
    quantizer = RowQuantizer("int8", sum_group=16)
    parts = split_rows(quantize_rows(x, quantizer), quantizer, 24)
    assert parts.sums.tolist() == [[512, 256]]
    whole = RowQuantizer("int8", symmetric=False, sum_group=24)
    parts = split_rows(quantize_rows(x + 128, whole), whole, 24)
    assert parts.zeros.tolist() == [-128.0]
    assert parts.sums.tolist() == [[768]]


def test_rows_with_sums_are_laid_out_after_those_without() -> None:
    plain, summed = INT8.layout(100), RowQuantizer("int8", sum_group=32).layout(100)
    assert (plain.scales_at, plain.zero_at, plain.stride) == (112, 116, 128)
    assert (summed.scales_at, summed.zero_at, summed.sums_at) == (112, 116, 120)
    assert (plain.sums, summed.sums, summed.stride) == (0, 4, 144)


def test_static_values_outside_the_range_saturate() -> None:
    x = torch.tensor([[1e30, -1e30, 1.0]])
    scale, quantizer = torch.tensor([0.5]), RowQuantizer("int8", PER_TENSOR)
    rows = quantize_rows(x, quantizer, scale)
    assert split_rows(rows, quantizer, 3).codes.tolist() == [[127, -127, 2]]
    quantizer = RowQuantizer("int8", PER_TENSOR, symmetric=False)
    rows = quantize_rows(x, quantizer, scale, torch.tensor([5.0]))
    assert split_rows(rows, quantizer, 3).codes.tolist() == [[127, -128, 7]]
    quantizer = RowQuantizer("e4m3", PER_TENSOR)
    rows = quantize_rows(x, quantizer, scale)
    assert split_rows(rows, quantizer, 3).codes.float().tolist() == [[448.0, -448.0, 2.0]]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("run", [quantize_rows, None], ids=["cpu", "reference"])
def test_what_is_not_finite_makes_its_scale_nan(
    poison: float, run: Callable[..., Tensor] | None
) -> None:
    run = run or (lambda *inputs: join_rows(reference_quantize(*inputs)))
    x = torch.randn(3, 256)
    x[1, 200] = poison
    for quantizer, scale, zero in CASES:
        parts = split_rows(run(x, quantizer, scale, zero), quantizer, 256)
        is_nan = parts.scales.isnan()
        expected = torch.zeros_like(is_nan)
        if quantizer.group_size > 0:
            expected[1, 200 // quantizer.group_size] = True
        elif quantizer.group_size == PER_TENSOR and scale is None:
            expected[:] = True
        else:
            expected[1] = True
        assert torch.equal(is_nan, expected)
        assert parts.dequantize()[1, 200].isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_reaches_the_output_of_norms_and_activations(kind: Kind) -> None:
    source = random_source(kind, 3, 64, torch.float32)
    source.x[2, 5] = torch.nan
    rows = generic.quantise(source, INT8, None, None)
    assert split_rows(rows, INT8, 64).scales.isnan().flatten().tolist() == [False, False, True]


@pytest.mark.parametrize("quantizer", DYNAMIC, ids=name)
def test_quantised_values_are_near(quantizer: RowQuantizer) -> None:
    source = random_source("norm", 8, 256, torch.float32)
    values = values_of(source).clamp(-quantizer.upper_bound, quantizer.upper_bound)
    parts = reference_quantize(values, quantizer)
    spread = parts.scales.repeat_interleave(parts.group_size, 1)[:, :256]
    half = spread / 2
    if quantizer.code == "e4m3":
        half = (values.abs() / 16).maximum(spread / 1024)
    # Beyond half a step: the zero-point is rounded too, and products are rounded to float32.
    slack = 2.001 if not quantizer.symmetric else 1.001
    assert bool(((parts.dequantize() - values).abs() <= half * slack).all())


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 4),
    st.integers(1, 300),
    st.sampled_from(DYNAMIC),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_any_shape(
    rows: int, width: int, quantizer: RowQuantizer, dtype: torch.dtype, seed: int
) -> None:
    source = random_source("x", rows, width, dtype, seed)
    check(quantize_rows(source.x, quantizer), source, quantizer)


X, W = torch.randn(2, 8), torch.randn(8)
ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_rows(X.double(), INT8), "activations of torch.float64 are not served"),
        (lambda: quantize_rows(X, RowQuantizer("int4")), "code 'int4' are not served"),
        (lambda: quantize_rows(X, RowQuantizer("int8", -2)), "group_size is -2"),
        (lambda: quantize_rows(X, RowQuantizer("int8", upper_bound=0.0)), "upper_bound is 0.0"),
        (lambda: quantize_rows(X, RowQuantizer("e4m3", symmetric=False)), "have no zero-point"),
        (
            lambda: quantize_rows(X, RowQuantizer("e4m3", sum_group=16)),
            "E4M3 are not summed; use 0",
        ),
        (
            lambda: quantize_rows(X, RowQuantizer("int8", sum_group=12)),
            "sum_group is 12; use a mult",
        ),
        (
            lambda: quantize_rows(X, RowQuantizer("int8", sum_group=-16)),
            "sum_group is -16; use a m",
        ),
        (
            lambda: silu_mul_quantize(X, RowQuantizer("int8", sum_group=8)),
            "the 4 channels of a row",
        ),
        (lambda: quantize_rows(X, INT8, ONE), "group_size is -1, but a static scale"),
        (lambda: quantize_rows(X, STATIC[0][0], W), r"zero-point has shape \(8,\); use \(1,\)"),
        (lambda: quantize_rows(X, INT8, None, ONE), "a zero-point is given without a scale"),
        (
            lambda: quantize_rows(X, STATIC[0][0], ONE, ONE),
            "zero-point is given and symmetric is T",
        ),
        (lambda: quantize_rows(X, STATIC[1][0], ONE), "is not given and symmetric is False"),
        (lambda: quantize_rows(X, RowQuantizer("int8", 4, False)), "zero-points are per token"),
        (lambda: rms_norm_quantize(X, W[:7], 1e-5, INT8), r"weight has shape \(7,\), expected"),
        (lambda: add_rms_norm_quantize(X, X.half(), W, 1e-5, INT8), "residual is torch.float16"),
        (lambda: silu_mul_quantize(X[:, :7], INT8), "x has 7 channels; silu_mul takes 2 K"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
