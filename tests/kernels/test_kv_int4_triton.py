"""Attention over the 4-bit cache on CUDA, without a GPU: its kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit_kernels.kv_int4 import Softmax, reference
from quantkit_kernels.kv_int4 import triton as backend
from quantkit_kernels.kv_int4.triton_attend import run_attend
from quantkit_kernels.kv_int4.triton_tiles import DecodeTile
from tests.kernels.interpreted import (
    error,
    in_interpreter,
    interpreter,
    run_in_interpreter,
    starts_the_interpreter,
)
from tests.kernels.kv_int4_triton_cases import (
    HEADS,
    Case,
    layout_of,
    make,
    room_for,
    softmax_of,
)

FP32_ERROR = 1e-5
"""fp32 throughout, sums in another order than the reference's."""

FP16_ERROR = 3e-3
"""Probabilities times scales are rounded to 8 bits, 1.1e-3 in all; queries and out to 11."""

PREFILL_FP16_ERROR = 1e-3
"""Keys, values and queries rounded to 11 bits, 2e-4 each."""


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Uninitialised tensors hold NaN."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@interpreter
@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


def check_attend(
    case: Case, softmax: Softmax, sinks: Tensor | None, limit: float, splits: int | None = None
) -> Tensor:
    """`attend` agrees with the reference, and leaves alone what is not its."""
    room = room_for(case.query)
    out = room[1:-1]
    how = (case.batch, case.layout, case.treatment, softmax, sinks)
    if splits is None:
        backend.attend(case.query, case.cache, out, *how)
    else:
        tile = DecodeTile(rows=8, tokens=64, warps=2, stages=3)
        run_attend(case.query, case.cache, out, *how, tile, splits)
    expected = torch.full(out.shape, float("nan"))
    reference.attend(case.query.float(), case.cache, expected, *how)
    assert error(out, expected) <= limit
    assert room[0].isnan().all()
    assert room[-1].isnan().all()
    return out


@interpreter
@in_interpreter
@pytest.mark.parametrize("group", [1, 4, 7, 8, 16])
def test_every_group_of_heads(group: int) -> None:
    case = make(layout_of(128), [70], [1], group, dtype=torch.float16)
    check_attend(case, softmax_of(case), None, FP16_ERROR)


@interpreter
@in_interpreter
@pytest.mark.parametrize("size", [32, 64, 80, 96, 128, 192, 256])
def test_every_head_size(size: int) -> None:
    case = make(layout_of(size), [75], [1], 2, treated=True)
    check_attend(case, softmax_of(case), None, FP32_ERROR)


@interpreter
@in_interpreter
@pytest.mark.parametrize(("size", "groups"), [(64, (64, 64)), (128, (64, 32)), (128, (32, 32))])
def test_other_groups_of_dimensions(size: int, groups: tuple[int, int]) -> None:
    layout = layout_of(size, key_group=groups[0], value_group=groups[1], block_size=128)
    case = make(layout, [70], [1], dtype=torch.float16)
    check_attend(case, softmax_of(case), None, FP16_ERROR)


@interpreter
@in_interpreter
@pytest.mark.parametrize(("window", "softcap", "sinks"), [
    (1, 0.0, False), (50, 0.0, True), (0, 3.0, False), (50, 3.0, True),
])  # fmt: skip
def test_windows_softcaps_and_sinks(window: int, softcap: float, sinks: bool) -> None:
    case = make(layout_of(64), [130, 40], [1, 1], treated=True, window=window)
    logits = torch.randn(HEADS * 4) if sinks else None
    softmax = softmax_of(case, window=window, softcap=softcap)
    check_attend(case, softmax, logits, FP32_ERROR)


@interpreter
@in_interpreter
@pytest.mark.parametrize(("group", "window"), [(1, 2), (7, 66), (16, 0)])
def test_several_queries_a_request(group: int, window: int) -> None:
    case = make(layout_of(64), [130, 4], [3, 4], group, treated=True, window=window)
    check_attend(case, softmax_of(case, window=window), None, FP32_ERROR)


@interpreter
@in_interpreter
def test_padding_is_left_alone() -> None:
    case = make(layout_of(64), [70, 0, 66], [1, 2, 0], dtype=torch.float16)
    out = check_attend_of_padded(case)
    assert out[0].isfinite().all()
    assert out[1:].isnan().all()


def check_attend_of_padded(case: Case) -> Tensor:
    out = room_for(case.query)
    backend.attend(
        case.query, case.cache, out[: len(case.query)], *case[2:3], case.layout, case.treatment,
        softmax_of(case),
    )  # fmt: skip
    return out


@interpreter
@in_interpreter
def test_splits_agree_and_repeat() -> None:
    case = make(layout_of(64), [200], [2], 3, treated=True, window=130)
    softmax, sinks = softmax_of(case, window=130), torch.randn(HEADS * 3)
    for splits in (1, 3):
        out = check_attend(case, softmax, sinks, FP32_ERROR, splits)
        assert torch.equal(out, check_attend(case, softmax, sinks, FP32_ERROR, splits))


@interpreter
@in_interpreter
@pytest.mark.parametrize("plane", ["key_words", "value_words"])
def test_a_token_that_is_nan_makes_its_request_nan(plane: str) -> None:
    case = make(layout_of(64), [70, 40], [1, 1])
    block = case.batch.block_table[0, 0]
    getattr(case.layout.planes(case.cache), plane)[block, :, 0, 5] = reference.NAN_WORD
    out = check_attend_of_padded(case)
    assert out[0].isnan().any(-1).all()
    assert out[1].isfinite().all()


@interpreter
@in_interpreter
def test_a_later_token_that_is_nan_spares_earlier_queries() -> None:
    case = make(layout_of(64), [70], [2])
    block = case.batch.block_table[0, 1]
    case.layout.planes(case.cache).value_words[block, :, 0, 5] = reference.NAN_WORD
    out = check_attend_of_padded(case)
    assert out[0].isfinite().all()
    assert out[1].isnan().any(-1).all()


def check_prefill(
    case: Case, softmax: Softmax, sinks: Tensor | None, raw: bool, limit: float
) -> None:
    room = room_for(case.query)
    out = room[1:-1]
    how = (case.batch, case.layout, case.treatment, softmax, sinks)
    backend.prefill(case.query, case.key, case.value, case.cache, out, *how, raw=raw)
    expected = torch.full(out.shape, float("nan"))
    rows = (case.query.float(), case.key.float(), case.value.float())
    reference.prefill(*rows, case.cache, expected, *how, raw=raw)
    assert error(out, expected) <= limit
    assert room[0].isnan().all()
    assert room[-1].isnan().all()


@interpreter
@in_interpreter
@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(("size", "dtype"), [(64, torch.float32), (80, torch.float16)])
def test_mixed_batches_are_prefilled(size: int, dtype: torch.dtype, raw: bool) -> None:
    case = make(layout_of(size), [66, 70, 1], [20, 3, 1], 2, dtype=dtype, treated=True)
    limit = FP32_ERROR if dtype == torch.float32 else PREFILL_FP16_ERROR
    check_prefill(case, softmax_of(case), None, raw, limit)


@interpreter
@in_interpreter
@pytest.mark.parametrize(("options", "raw"), [
    ({"window": 20}, True), ({"softcap": 3.0}, True), ({"window": 67, "softcap": 3.0}, False),
])  # fmt: skip
def test_prefill_with_all_else(options: dict[str, Any], raw: bool) -> None:
    window = options.get("window", 0)
    case = make(layout_of(96), [40, 140], [40, 7], 3, treated=True, window=window)
    check_prefill(case, softmax_of(case, **options), torch.randn(HEADS * 3), raw, FP32_ERROR)
