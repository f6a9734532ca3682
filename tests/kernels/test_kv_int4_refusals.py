"""What the ops on caches of 4 bits refuse: one sentence with the value and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantkit_kernels.kv_int4 import (
    CacheLayout,
    KeyTreatment,
    Softmax,
    attend,
    check_treatment_values,
    gather,
    prefill,
    write,
)
from tests.kernels.kv_int4_cases import Case, Step, build

LAYOUT = CacheLayout(64, 16)
ONES = torch.ones(2, 64)


@pytest.fixture
def step() -> Step:
    return build(Case())


def call_write(step: Step, **changes: object) -> None:
    arguments = {
        "key": step.key,
        "value": step.value,
        "cache": step.cache,
        "slots": torch.arange(len(step.key)),
        "layout": LAYOUT,
        "treatment": step.treatment,
    }
    write(**(arguments | changes))


def call_attend(step: Step, **changes: object) -> None:
    batch = {name: changes.pop(name) for name in step.batch._fields if name in changes}
    arguments = {
        "query": step.query,
        "cache": step.cache,
        "out": step.out,
        "batch": step.batch._replace(**batch),
        "layout": LAYOUT,
        "treatment": step.treatment,
        "softmax": step.case.softmax,
    }
    attend(**(arguments | changes))


def call_prefill(step: Step, **changes: Tensor) -> None:
    rows = {"query": step.query, "key": step.key, "value": step.value} | changes
    prefill(*rows.values(), *step.attention)


def call_gather(step: Step, **changes: object) -> None:
    arguments = {
        "cache": step.cache,
        "blocks": step.batch.block_table[0],
        "start": 0,
        "stop": 20,
        "keys": torch.empty(20, 2, 64),
        "values": torch.empty(20, 2, 64),
        "layout": LAYOUT,
    }
    gather(**(arguments | changes))


def table(step: Step, entry: int) -> Tensor:
    changed = step.batch.block_table.clone()
    changed[0, 0] = entry
    return changed


WRITE: dict[str, tuple[Callable[[Step], dict[str, object]], str]] = {
    "cache shape": (
        lambda s: {"cache": s.cache[..., :-2]},
        r"cache is torch.uint8 \(10, 2, 16, 70\).*need torch.uint8 \(blocks, heads, 16, 72\)",
    ),
    "cache dtype": (lambda s: {"cache": s.cache.view(torch.int8)}, "the cache is torch.int8"),
    "cache dimensions": (lambda s: {"cache": s.cache[0]}, r"the cache is torch.uint8 \(2, 16, 72"),
    "cache strides": (
        lambda s: {"cache": s.cache.mT.contiguous().mT},
        r"cache has strides .*last two are \(72, 1\)",
    ),
    "cache heads": (lambda s: {"cache": s.cache[:, :1]}, "key has 2 heads, but the cache has 1"),
    "slots past": (
        lambda _: {"slots": torch.tensor([3, 160])},
        "a slot is 160, but the cache has 10 blocks of 16 tokens; use slots below 160",
    ),
    "slots dtype": (
        lambda _: {"slots": torch.arange(3).int()},
        r"slots are torch.int32 \(3,\); .*need torch.int64",
    ),
    "slots number": (lambda s: {"slots": torch.arange(len(s.key) + 1)}, "with n at most 7"),
    "key dtype": (
        lambda s: {"key": s.key.double()},
        "activations of torch.float64 are not served; use one of",
    ),
    "mixed dtypes": (
        lambda s: {"value": s.value.half()},
        "value is torch.float16 .*; the key is torch.float32 .* both must agree",
    ),
    "head size": (
        lambda s: {"key": s.key[..., :32]},
        r"key has shape \(7, 2, 32\); this cache takes \(tokens, heads, 64\)",
    ),
    "key strides": (
        lambda s: {"key": s.key.mT.contiguous().mT},
        r"key has strides .*must be contiguous: copy it",
    ),
    "shift shape": (
        lambda _: {"treatment": KeyTreatment(ONES[:1])},
        r"keys' shift is torch.float32 \(1, 64\); the cache needs torch.float32 \(2, 64\)",
    ),
    "scale dtype": (
        lambda _: {"treatment": KeyTreatment(None, ONES.half())},
        "the keys' scale is torch.float16",
    ),
    "layout": (lambda _: {"layout": CacheLayout(64, 32)}, "in blocks of 32 tokens need"),
}


@pytest.mark.parametrize("name", WRITE)
def test_write(step: Step, name: str) -> None:
    changes, message = WRITE[name]
    with pytest.raises(ValueError, match=message):
        call_write(step, **changes(step))


ATTEND: dict[str, tuple[Callable[[Step], dict[str, object]], str]] = {
    "heads": (
        lambda s: {"query": s.query[:, :3], "out": s.out[:, :3]},
        "3 query heads do not divide among 2 KV heads; use a multiple",
    ),
    "out dtype": (
        lambda s: {"out": s.out.bfloat16()},
        "out is torch.bfloat16 .*; the query is torch.float32 .* both must agree",
    ),
    "out shape": (lambda s: {"out": s.out[:-1]}, r"out is torch.float32 \(6, 4, 64\)"),
    "out strides": (lambda s: {"out": s.out.mT.contiguous().mT}, "out has strides"),
    "query dtype": (
        lambda s: {"query": s.query.double()},
        "activations of torch.float64 are not served",
    ),
    "query head size": (lambda s: {"query": s.query[..., :63]}, r"query has shape \(7, 4, 63\)"),
    "cache": (lambda s: {"cache": s.cache.int()}, "the cache is torch.int32"),
    "shift": (lambda _: {"treatment": KeyTreatment(ONES[0])}, r"shift is torch.float32 \(64,\)"),
    "sinks shape": (
        lambda _: {"sinks": torch.zeros(2)},
        r"sinks are torch.float32 \(2,\); 4 query heads need torch.float32 \(4,\)",
    ),
    "sinks dtype": (lambda _: {"sinks": torch.zeros(4).half()}, "sinks are torch.float16"),
    "scale": (lambda _: {"softmax": Softmax(torch.nan)}, "scale is nan; it must be finite"),
    "window": (lambda _: {"softmax": Softmax(1.0, -1)}, "window is -1; use a number of tokens"),
    "softcap": (
        lambda _: {"softmax": Softmax(1.0, 0, -2.0)},
        "softcap is -2.0; use a positive number, or 0",
    ),
    "softcap inf": (lambda _: {"softmax": Softmax(1.0, 0, torch.inf)}, "softcap is inf"),
    "table dtype": (
        lambda s: {"block_table": s.batch.block_table.long()},
        "block_table is torch.int64 .*; a batch of 4 requests needs torch.int32",
    ),
    "table shape": (
        lambda s: {"block_table": s.batch.block_table[:3]},
        r"block_table is torch.int32 \(3, 5\)",
    ),
    "table dimensions": (
        lambda s: {"block_table": s.batch.block_table[:, 0].contiguous()},
        r"block_table is torch.int32 \(4,\)",
    ),
    "table strides": (
        lambda s: {"block_table": s.batch.block_table.T.contiguous().T},
        "block_table has strides .*rows must be contiguous: copy it",
    ),
    "lengths dtype": (lambda s: {"seq_lens": s.batch.seq_lens.long()}, "seq_lens is torch.int64"),
    "starts": (
        lambda s: {"query_start": s.batch.query_start[:-1]},
        r"query_start is torch.int32 \(4,\)",
    ),
    "bound": (lambda _: {"max_query_len": -1}, "max_query_len is -1; give an upper bound"),
    "tokens past the table": (
        lambda s: {"seq_lens": s.batch.seq_lens + 50},
        "a request has 100 tokens, but its row of block_table holds 80; give it more blocks",
    ),
    "tokens past the bound": (
        lambda _: {"max_seq_len": 49},
        "a request has 50 tokens, but max_seq_len is 49",
    ),
    "queries past the bound": (
        lambda _: {"max_query_len": 3},
        r"query_start is \[0, 1, 2, 3, 7\], but max_query_len is 3",
    ),
    "descending": (
        lambda s: {"query_start": s.batch.query_start.flip(0)},
        r"query_start is \[7, 3, 2, 1, 0\].*give ascending rows",
    ),
    "rows past the queries": (
        lambda s: {"query": s.query[:6], "out": s.out[:6]},
        r"query_start is \[0, 1, 2, 3, 7\], but there are 6 queries; give rows that exist",
    ),
    "more queries than tokens": (
        lambda s: {"seq_lens": s.batch.seq_lens.clamp_max(3)},
        "a request has 4 queries, but 3 tokens; its tokens include those of its queries",
    ),
    "block past": (
        lambda s: {"block_table": table(s, 10)},
        "names block 10, but the cache has 10 blocks; use 0 to 9",
    ),
    "block before": (lambda s: {"block_table": table(s, -1)}, "names block -1"),
}


@pytest.mark.parametrize("name", ATTEND)
def test_attend(step: Step, name: str) -> None:
    changes, message = ATTEND[name]
    with pytest.raises(ValueError, match=message):
        call_attend(step, **changes(step))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda s: {"key": s.key[:-1], "value": s.value[:-1]}, "a key for each query"),
        (lambda s: {"query": s.query.half()}, "out is torch.float32"),
        (lambda s: {"key": s.key.half(), "value": s.value.half()}, "use one dtype"),
        (lambda s: {"value": s.value[:, :1]}, r"the value is torch.float32 \(7, 1, 64\)"),
    ],
)
def test_prefill(step: Step, changes: Callable[[Step], dict[str, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call_prefill(step, **changes(step))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop": 81}, "positions 0 to 81 are asked for, but the blocks hold 80"),
        ({"start": 21}, "positions 21 to 20"),
        ({"start": -1}, "positions -1 to 20"),
        (
            {"keys": torch.empty(19, 2, 64)},
            r"keys have shape \(19, 2, 64\); 20 positions need at l",
        ),
        ({"values": torch.empty(20, 2, 80)}, r"values have shape \(20, 2, 80\)"),
        ({"values": torch.empty(20, 2, 64).double()}, "activations of torch.float64"),
        ({"blocks": torch.zeros(3)}, r"blocks are torch.float32 \(3,\); use a row"),
        ({"blocks": torch.tensor([1, 11]).int()}, "names block 11"),
        ({"layout": CacheLayout(80, 16)}, "heads of 80 dimensions"),
    ],
)
def test_gather(step: Step, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call_gather(step, **changes)


@pytest.mark.parametrize(
    ("treatment", "message"),
    [
        (KeyTreatment(ONES * torch.nan), "keys' shift holds nan; .*finite: calibrate again"),
        (KeyTreatment(None, ONES * torch.inf), "keys' scale holds inf"),
        (KeyTreatment(ONES, ONES * 0), "keys' scale holds 0.0; all its numbers are positive"),
        (KeyTreatment(ONES, -ONES), "keys' scale holds -1.0.*leave the scale out"),
    ],
)
def test_treatments_that_a_model_may_not_load(treatment: KeyTreatment, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_treatment_values(treatment)


def test_good_treatments_pass() -> None:
    for treatment in (KeyTreatment(), KeyTreatment(-ONES), KeyTreatment(ONES, ONES)):
        check_treatment_values(treatment)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_size": 0}, "head_size is 0"),
        ({"head_size": 257}, "head_size is 257; .* at most 256"),
        ({"block_size": 24}, "block_size is 24; a block holds a multiple of 16"),
        ({"block_size": 0}, "block_size is 0"),
        ({"key_group": 128}, r"key_group is 128; use one of \(32, 64\)"),
        ({"value_group": 16}, "value_group is 16"),
    ],
)
def test_layouts(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LAYOUT, **changes)


def test_entries_behind_the_last_block_may_be_any(step: Step) -> None:
    assert int(step.batch.block_table.max()) == 1 << 30
    step.cache.zero_()
    call_attend(step)
    assert bool(step.out.isfinite().all())


def test_an_empty_batch() -> None:
    nothing = build(Case(lengths=((0, 0),)))
    call_attend(nothing)
    call_write(nothing)
    batch = nothing.batch
    call_attend(
        nothing,
        block_table=batch.block_table[:0],
        seq_lens=batch.seq_lens[:0],
        query_start=batch.query_start[:1],
    )
