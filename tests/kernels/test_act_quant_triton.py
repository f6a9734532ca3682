"""The CUDA kernel of the activation ops without a GPU: interpreted, against the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
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
from tests.kernels.act_quant_cases import CASES, KINDS, check, name, random_source
from tests.kernels.interpreted import (
    in_interpreter,
    interpreter,
    run_in_interpreter,
    starts_the_interpreter,
)

DTYPES = {"x": torch.bfloat16, "norm": torch.bfloat16, "silu_mul": torch.bfloat16}
"""Where x is only read. The interpreter does not round float32 to bfloat16 as GPUs do."""


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
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # infinity, as on a GPU
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
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NaN, as on a GPU
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
def test_no_rows() -> None:
    for kind in KINDS:
        source = random_source(kind, 0, 40, torch.float16)
        check(
            backend.quantise(source, RowQuantizer("int8"), None, None), source, RowQuantizer("int8")
        )


@pytest.mark.parametrize(
    ("kind", "quantizer", "width", "served"),
    [
        ("silu_mul", RowQuantizer("int8"), 28672, True),
        ("silu_mul", RowQuantizer("int8"), 32769, False),
        ("norm", RowQuantizer("e4m3", 128), 16384, True),
        ("add_norm", RowQuantizer("int8"), 16385, False),
        ("x", RowQuantizer("e4m3", 96), 1024, False),
        ("x", RowQuantizer("e4m3", 8), 1024, False),
    ],
)
def test_what_the_kernel_serves(
    kind: Kind, quantizer: RowQuantizer, width: int, served: bool
) -> None:
    assert backend.is_served(kind, quantizer, width) == served


def test_other_rows_go_another_way() -> None:
    source, quantizer = random_source("x", 2, 200, torch.bfloat16), RowQuantizer("e4m3", 96)
    check(backend.quantise(source, quantizer, None, None), source, quantizer)
