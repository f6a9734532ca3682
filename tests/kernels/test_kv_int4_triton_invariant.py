"""Where batches are invariant, a request's attention has the same bits whatever else is run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quantkit_kernels.kv_int4 import Batch
from quantkit_kernels.kv_int4 import triton as backend
from quantkit_kernels.kv_int4.triton_tiles import (
    INVARIANT_SPLITS,
    decode_tile,
    prefill_tile,
    splits_of,
)
from quantkit_kernels.triton_common import INTERPRETED as DEVICE
from quantkit_kernels.tuning import set_batch_invariant
from tests.kernels.interpreted import (
    in_interpreter,
    interpreter,
    run_in_interpreter,
    starts_the_interpreter,
)
from tests.kernels.kv_int4_triton_cases import Case, layout_of, make, softmax_of


@pytest.fixture(autouse=True)
def _invariant() -> Iterator[None]:
    set_batch_invariant(on=True)
    torch.manual_seed(0)
    yield
    set_batch_invariant(on=False)


@interpreter
@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


def alone(case: Case) -> Case:
    """The first request of a batch, and nothing of the others."""
    _, lengths, starts, *_ = case.batch
    length, queries = int(lengths[0]), int(starts[1])
    batch = Batch(case.batch.block_table[:1], lengths[:1], starts[:2], queries, length)
    rows = (case.query[:queries], case.key[:queries], case.value[:queries])
    return Case(case.layout, case.cache, batch, *rows, case.treatment)


def attended(case: Case) -> Tensor:
    out = torch.empty_like(case.query)
    how = (case.batch, case.layout, case.treatment, softmax_of(case), None)
    backend.attend(case.query, case.cache, out, *how)
    return out


def prefilled(case: Case) -> Tensor:
    out = torch.empty_like(case.query)
    how = (case.batch, case.layout, case.treatment, softmax_of(case), None)
    backend.prefill(case.query, case.key, case.value, case.cache, out, *how)
    return out


@interpreter
@in_interpreter
@pytest.mark.parametrize(("lengths", "queries"), [
    ([150, 600, 40], [1, 1, 1]), ([150, 70], [1, 5]), ([150, 70], [2, 9]),
], ids=str)  # fmt: skip
def test_a_request_alone_and_in_a_batch(lengths: list[int], queries: list[int]) -> None:
    case = make(layout_of(64), lengths, queries, 3, dtype=torch.float16)
    assert torch.equal(attended(alone(case)), attended(case)[: queries[0]])


@interpreter
@in_interpreter
def test_a_prompt_alone_and_in_a_batch() -> None:
    case = make(layout_of(64), [70, 90], [6, 60], 2, dtype=torch.float16)
    assert torch.equal(prefilled(alone(case)), prefilled(case)[:6])


def test_no_cut_depends_on_the_batch() -> None:
    layout = layout_of(128)
    tile = decode_tile(4, layout, DEVICE, exact=False)
    for requests, longest in ((1, 100), (64, 131072)):
        assert splits_of(requests, 8, longest, tile, DEVICE) == INVARIANT_SPLITS
    few, many = (prefill_tile(rows, layout, DEVICE, exact=False) for rows in (16, 4096))
    assert few == many
