"""Calls of every public operation, with the definition that their results are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.gpu.contender import SHORT_SUMS
from quantkit_kernels.act_quant import (
    RowQuantizer,
    add_rms_norm_quantize,
    quantize_rows,
    rms_norm_quantize,
    silu_mul_quantize,
)
from quantkit_kernels.act_quant.source import Source
from quantkit_kernels.kv_int4 import CacheLayout, attend, prefill, reference
from quantkit_kernels.llm_int8 import llm_int8_linear, pack_llm_int8, reference_llm_int8
from quantkit_kernels.scaled_mm import pack_scaled, reference_scaled_linear, scaled_linear
from quantkit_kernels.wna16 import QuantizedWeight, pack_weight, reference_linear, wna16_linear
from tests.kernels import act_quant_cases, scaled_mm_cases, wna16_cases
from tests.kernels.kv_int4_triton_cases import Case as Requests
from tests.kernels.kv_int4_triton_cases import make, softmax_of

T = TypeVar("T")

MAX_ERROR = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}
"""|y - reference| / |reference|, by dtype of y.

16 bits: y is rounded, and so are scaled weights, or code books' numbers, in some tiles, each by
1.7e-3 in bfloat16 and 2.1e-4 in float16. float32: sums in another order than the reference's.
"""

CACHE_ERROR = {torch.bfloat16: 1e-2, torch.float16: 3e-3}
"""Probabilities, queries and keys are rounded to 8 or 11 bits besides."""

QUANTISED = 37
"""Tokens whose rows are quantised."""

THRESHOLD = 6.0
"""Of LLM.int8."""

INT8, E4M3 = RowQuantizer("int8"), RowQuantizer("e4m3")
SCALED = (
    ("int", INT8, None),
    ("int", RowQuantizer("int8", symmetric=False), None),
    ("e4m3", E4M3, None),
    ("e5m2", E4M3, None),
    ("e4m3", RowQuantizer("e4m3", 128), 128),
)
"""Code type of weights, rows, and channels that share a weight's scale."""

INTEGERS = (
    {"bits": 4, "group_size": 128, "symmetric": True},
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 64, "act_order": True},
    {"bits": 3, "group_size": 128},
    {"bits": 8, "group_size": 128, "symmetric": True},
    {"bits": 8, "group_size": 32},
)
OTHERS = (
    {"bits": 4, "group_size": 64, "code_type": "nf4"},
    {"bits": 8, "group_size": 128, "code_type": "e4m3"},
)


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: for the report.
        call: runs it; every call returns the same.
        verify: raises AssertionError where a result is not what the definition says.
        alone: the first row of the result, of a call on the first token only; None where a call
            knows no tokens.
    """

    name: str
    call: Callable[[], Tensor]
    verify: Callable[[Tensor], None]
    alone: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Extent:
    """How much is tried.

    Attributes:
        device: where.
        shapes: (N, K) of weights.
        tokens: M, on both sides of every limit between tiles.
        dtypes: of activations.
        widths: channels of quantised rows.
    """

    device: str
    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    widths: tuple[int, ...]


def whole(device: str) -> Extent:
    """Everything."""
    tokens = (1, 2, 8, 16, 17, 32, 33, 64, 65, 128, 129, 257, 512, 513, 1025, 2048)
    shapes = ((96, 320), (1024, 2048), (4096, 4096))
    return Extent(device, shapes, tokens, tuple(MAX_ERROR), (7, 36, 4096, 14336))


def small(device: str) -> Extent:
    """A little of everything, for tools under which a kernel takes a thousand times longer."""
    return Extent(device, ((160, 512),), (1, 17, 70), (torch.bfloat16,), (200, 512))


def cases(extent: Extent) -> Iterator[Case]:
    """All calls."""
    yield from weight_only(extent)
    yield from scaled(extent)
    yield from llm_int8(extent)
    yield from fused(extent)
    yield from caches(extent)


def weight_only(extent: Extent) -> Iterator[Case]:
    """`wna16_linear`: widths, groups, orders and code types."""
    for n, k in extent.shapes:
        for how in (*INTEGERS, *OTHERS):
            weight = to(wna16_cases.random_weight(n, k, **how), extent.device)
            for dtype in extent.dtypes:
                packed = pack_weight(weight, dtype)
                bias = to(torch.randn(n).to(dtype), extent.device)
                for m in extent.tokens:
                    x = to(wna16_cases.random_inputs(m, k, dtype=dtype), extent.device)
                    given = bias if m % 2 else None
                    yield linear_case(
                        f"wna16 {how} {n} x {k}, {dtype}, M = {m}",
                        partial(wna16_linear, weight=packed, bias=given),
                        x,
                        partial(reference_linear, x, weight, given),
                        MAX_ERROR[dtype],
                    )


def scaled(extent: Extent) -> Iterator[Case]:
    """`scaled_linear`: integers and floats of 8 bits, scales per row and in blocks."""
    for n, k in extent.shapes:
        for code_type, quantizer, group in SCALED:
            weight = scaled_mm_cases.random_scaled_weight(n, k, code_type, group)
            weight = to(weight, extent.device)
            packed = pack_scaled(weight, quantizer, torch.bfloat16)
            for m in extent.tokens:
                rows = to(scaled_mm_cases.random_rows(m, k, quantizer), extent.device)
                yield linear_case(
                    f"scaled_mm {code_type} {quantizer} {n} x {k}, M = {m}",
                    partial(scaled_linear, weight=packed, dtype=torch.bfloat16),
                    rows,
                    partial(reference_scaled_linear, rows, weight, quantizer),
                    MAX_ERROR[torch.bfloat16] if code_type == "int" else SHORT_SUMS,
                )


def llm_int8(extent: Extent) -> Iterator[Case]:
    """`llm_int8_linear`."""
    for n, k in extent.shapes:
        weight = to(scaled_mm_cases.random_scaled_weight(n, k), extent.device)
        for dtype in extent.dtypes:
            packed = pack_llm_int8(weight, dtype)
            for m in extent.tokens:
                x = to(wna16_cases.random_inputs(m, k, dtype=dtype), extent.device)
                case = linear_case(
                    f"llm_int8 {n} x {k}, {dtype}, M = {m}",
                    partial(llm_int8_linear, weight=packed, threshold=THRESHOLD),
                    x,
                    partial(reference_llm_int8, x, weight, THRESHOLD),
                    MAX_ERROR[dtype],
                )
                # Which channels are outliers is a property of the batch.
                yield replace(case, alone=None)


def linear_case(
    name: str,
    linear: Callable[[Tensor], Tensor],
    x: Tensor,
    truth: Callable[[], Tensor],
    limit: float,
) -> Case:
    """A product; CPUs, and cuBLAS in float32, multiply one token in another order than several."""

    def verify(y: Tensor) -> None:
        check_error(y, truth(), limit)

    keeps_bits = x.is_cuda and x.dtype != torch.float32
    return Case(name, partial(linear, x), verify, partial(linear, x[:1]) if keeps_bits else None)


def check_error(y: Tensor, truth: Tensor, limit: float) -> None:
    """The relative error is at most `limit`.

    Raises:
        AssertionError: it is more, or there is a NaN.
    """
    error = float((y.float() - truth).norm() / truth.norm())
    assert error <= limit, f"off by {error:.1e} of the result, more than {limit:.1e}"


def fused(extent: Extent) -> Iterator[Case]:
    """`quantize_rows` and the operations that quantise what they make."""
    for kind in act_quant_cases.KINDS:
        for quantizer, scale, zero in act_quant_cases.CASES:
            for width in extent.widths:
                for dtype in extent.dtypes:
                    source = act_quant_cases.random_source(kind, QUANTISED, width, dtype)
                    moved = to((source, quantizer, scale, zero), extent.device)
                    verify = partial(check_rows, source, quantizer, scale, zero)
                    name = f"act_quant {kind} {quantizer} {width} {dtype}"
                    yield Case(name, partial(quantise, *moved), verify)


def quantise(
    source: Source, quantizer: RowQuantizer, scale: Tensor | None, zero: Tensor | None
) -> Tensor:
    """Rows of a source, by the public operation that makes them; behind them the sum's bytes."""
    how, x = (quantizer, scale, zero), source.x
    if source.kind == "x":
        return quantize_rows(x, *how)
    if source.kind == "silu_mul":
        return silu_mul_quantize(x, *how)
    assert source.weight is not None
    norm = source.weight, source.epsilon
    if source.residual is None:
        return rms_norm_quantize(x, *norm, *how)
    rows, total = add_rms_norm_quantize(x, source.residual, *norm, *how)
    return torch.cat([rows, total.view(torch.uint8)], 1)


def check_rows(
    source: Source, quantizer: RowQuantizer, scale: Tensor | None, zero: Tensor | None, made: Tensor
) -> None:
    """What `quantise` made is what the reference makes.

    Raises:
        AssertionError: it is not.
    """
    made, stride = made.cpu(), quantizer.layout(source.width).stride
    if source.total is not None:
        source.total.copy_(made[:, stride:].contiguous().view(source.total.dtype))
    act_quant_cases.check(made[:, :stride].contiguous(), source, quantizer, scale, zero)


def caches(extent: Extent) -> Iterator[Case]:
    """`kv_int4`'s attention: requests that decode, and prompts."""
    cuda = extent.device != "cpu"
    for dtype, limit in CACHE_ERROR.items():
        for size in (64, 128):
            layout = CacheLayout(size, 64, value_columns=cuda)
            for lengths, queries in (([70, 300, 1], [1, 1, 1]), ([90, 200], [40, 33])):
                case = make(layout, lengths, queries, dtype=dtype, treated=True)
                name = f"kv_int4 heads of {size}, {dtype}, lengths {lengths}, queries {queries}"
                verify = partial(_check_attention, case, limit)
                yield Case(name, partial(attention, to(case, extent.device)), verify)


def attention(case: Requests) -> Tensor:
    """Of a step, all keys and values read from the cache."""
    out = torch.empty_like(case.query)
    how = case.batch, case.layout, case.treatment, softmax_of(case)
    if case.batch.max_query_len == 1:
        attend(case.query, case.cache, out, *how)
    else:
        prefill(case.query, case.key, case.value, case.cache, out, *how, raw=False)
    return out


def _check_attention(case: Requests, limit: float, out: Tensor) -> None:
    truth = torch.empty(out.shape)
    how = case.batch, case.layout, case.treatment, softmax_of(case)
    reference.attend(case.query.float(), case.cache, truth, *how)
    check_error(out.cpu(), truth, limit)


def to(value: T, device: str) -> T:
    """Tensors on a device, also those of weights and named tuples; all else as it is."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device)
    elif isinstance(value, QuantizedWeight):
        names = ("codes", "scales", "zeros", "group_index")
        moved = replace(value, **{name: getattr(value, name).to(device) for name in names})
    elif isinstance(value, tuple):
        parts = [to(part, device) for part in value]
        moved = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return moved  # type: ignore[no-any-return]
