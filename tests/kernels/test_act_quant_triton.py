"""The CUDA kernel of the activation ops without a GPU: interpreted, against the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit_kernels.act_quant import (
    PER_TENSOR,
    RowQuantizer,
    join_rows,
    reference_quantize,
    split_rows,
)
from quantkit_kernels.act_quant import triton as backend
from quantkit_kernels.act_quant.source import Kind, Source
from tests.kernels.act_quant_cases import CASES, KINDS, check, name, random_source, row_of
from tests.kernels.interpreted import (
    in_interpreter,
    interpreter,
    run_in_interpreter,
    starts_the_interpreter,
)

DTYPES = {"x": torch.bfloat16, "norm": torch.bfloat16, "silu_mul": torch.bfloat16}
"""Where x is only read. The interpreter does not round float32 to bfloat16 as GPUs do."""


# Infinity and NaN are as on a GPU: of exponentials, and of rows that are zero or not finite.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Uninitialised floats are NaN, uninitialised bytes 255."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@interpreter
@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@interpreter
@in_interpreter
@pytest.mark.parametrize(("quantizer", "scale", "zero"), CASES, ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_references(
    kind: Kind, quantizer: RowQuantizer, scale: Tensor | None, zero: Tensor | None
) -> None:
    dtype = DTYPES.get(kind, torch.float16)
    for width, seen in ((1, torch.float32), (7, dtype), (200, torch.float32), (1024, dtype)):
        source = random_source(kind, 2, width, seen)
        check(backend.quantise(source, quantizer, scale, zero), source, quantizer, scale, zero)


@interpreter
@in_interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("code", ["e4m3", "int8"])
def test_every_16_bit_number(code: str, dtype: torch.dtype) -> None:
    """Ties, numbers that E4M3 has no exponent for, and all that saturate."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    x = torch.nn.functional.pad(x, (0, -len(x) % 16384)).view(-1, 16384)
    quantizer = RowQuantizer(code, PER_TENSOR)
    for scale in (1.0, 1.5):
        given = torch.tensor([scale])
        rows = backend.quantise(Source("x", x, 16384), quantizer, given, None)
        assert torch.equal(rows, join_rows(reference_quantize(x, quantizer, given)))


@interpreter
@in_interpreter
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_its_scale_nan(poison: float) -> None:
    x = torch.randn(3, 256)
    x[1, 200] = poison
    for quantizer, scale, zero in CASES:
        parts = split_rows(
            backend.quantise(Source("x", x, 256), quantizer, scale, zero), quantizer, 256
        )
        expected = reference_quantize(x, quantizer, scale, zero)
        assert torch.equal(parts.scales.isnan(), expected.scales.isnan())
        assert parts.scales.isnan().any()


@interpreter
@in_interpreter
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_sum_of_a_row(symmetric: bool) -> None:
    for kind, width in (("x", 7), ("norm", 100), ("silu_mul", 1100)):
        quantizer = RowQuantizer("int8", symmetric=symmetric, sum_group=width)
        source = random_source(kind, 2, width, torch.float32)
        check(backend.quantise(source, quantizer, None, None), source, quantizer)


@interpreter
@in_interpreter
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 2),
    st.integers(1, 2600),
    st.sampled_from(CASES),
    st.sampled_from([torch.float16, torch.float32]),
)
def test_any_shape(
    kind: Kind,
    rows: int,
    width: int,
    case: tuple[RowQuantizer, Tensor | None, Tensor | None],
    dtype: torch.dtype,
) -> None:
    source = random_source(kind, rows, width, dtype)
    check(backend.quantise(source, *case), source, *case)


@interpreter
@in_interpreter
@pytest.mark.parametrize(
    "quantizer", [RowQuantizer("int8", sum_group=64), RowQuantizer("e4m3", 128)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_alone_and_again(kind: Kind, quantizer: RowQuantizer) -> None:
    source = random_source(kind, 3, 700, torch.float16)
    rows = backend.quantise(source, quantizer, None, None)
    assert torch.equal(backend.quantise(source, quantizer, None, None), rows)
    for i in range(3):
        assert torch.equal(backend.quantise(row_of(source, i), quantizer, None, None)[0], rows[i])


@interpreter
@in_interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros(kind: Kind) -> None:
    source = random_source(kind, 2, 300, torch.float16)
    for tensor in (source.x, source.residual):
        if tensor is not None:
            tensor[0] = 0
    for quantizer in (RowQuantizer("int8", sum_group=32), RowQuantizer("e4m3", 128)):
        rows = backend.quantise(source, quantizer, None, None)
        check(rows, source, quantizer)
        assert not split_rows(rows, quantizer, 300).codes[0].float().any()


@interpreter
@in_interpreter
def test_no_rows() -> None:
    for kind in KINDS:
        source = random_source(kind, 0, 40, torch.float16)
        check(
            backend.quantise(source, RowQuantizer("int8"), None, None), source, RowQuantizer("int8")
        )


@pytest.mark.parametrize(
    ("quantizer", "width", "parts"),
    [
        (RowQuantizer("int8"), 1, (0, 0, 1)),
        (RowQuantizer("int8"), 2048, (0, 0, 2)),
        (RowQuantizer("int8"), 4096, (0, 0, 4)),
        (RowQuantizer("int8"), 5120, (0, 0, 4)),
        (RowQuantizer("int8"), 8192, (0, 0, 8)),
        (RowQuantizer("int8"), 16384, (0, 0, 16)),
        (RowQuantizer("int8"), 28672, (0, 0, 16)),
        (RowQuantizer("int8"), 32769, None),
        (RowQuantizer("e4m3", 128), 16384, (128, 0, 16)),
        (RowQuantizer("e4m3", 96), 1024, None),
        (RowQuantizer("e4m3", 8), 1024, None),
        (RowQuantizer("e4m3", 96), 96, (0, 0, 1)),
        (RowQuantizer("e4m3", 2048), 4100, (2048, 0, 4)),
        (RowQuantizer("e4m3", 4096), 5000, (4096, 0, 8)),
        (RowQuantizer("e4m3", 16384), 32768, None),
        (RowQuantizer("int8", sum_group=32), 4096, (0, 32, 4)),
        (RowQuantizer("int8", sum_group=100), 100, (0, 100, 1)),
        (RowQuantizer("int8", sum_group=112), 100, (0, 100, 1)),
        (RowQuantizer("int8", sum_group=96), 4096, None),
        (RowQuantizer("int8", sum_group=1024), 1500, (0, 1024, 2)),
        (RowQuantizer("int8", 32, sum_group=4096), 4096, (32, 4096, 4)),
    ],
    ids=name,
)
def test_how_the_kernel_takes_rows_apart(
    quantizer: RowQuantizer, width: int, parts: tuple[int, int, int] | None
) -> None:
    assert backend.cut(quantizer, width) == parts


def test_other_rows_go_another_way() -> None:
    source, quantizer = random_source("x", 2, 200, torch.bfloat16), RowQuantizer("e4m3", 96)
    check(backend.quantise(source, quantizer, None, None), source, quantizer)
