"""Writing to caches of 4 bits and attending to them: reference, any device, and the ops."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit_kernels.kv_int4 import (
    CacheLayout,
    KeyTreatment,
    Softmax,
    attend,
    gather,
    generic,
    head_rotation,
    prefill,
    reference,
    rotate_keys,
    rotate_values,
    write,
)
from tests.kernels.kv_int4_cases import (
    CASES,
    NONE,
    POISON,
    Case,
    Step,
    bound,
    build,
    decode,
    expected,
    read_cache,
    relative,
    stored,
)

BACKENDS = (reference, generic)
SMALL = ("D80", "G7", "columns", "all", "drafts", "bf16 all", "window 1")
"""Cases for what is slow."""


def write_all(step: Step, backend: ModuleType = generic) -> None:
    """Every token of every request."""
    for request, (key, value) in enumerate(step.tokens):
        slots = step.slots(request)
        backend.write(key, value, step.cache, slots, step.case.layout, step.treatment)


@pytest.mark.parametrize("name", CASES)
def test_attention_over_what_was_written(name: str) -> None:
    step = build(CASES[name])
    write_all(step)
    want = expected(step)
    generic.attend(step.query, *step.attention)
    assert relative(step.out, want) <= bound(step.case.dtype)


@pytest.mark.parametrize("name", SMALL)
def test_the_reference_attends_alike(name: str) -> None:
    step = build(CASES[name])
    write_all(step, reference)
    want = expected(step)
    reference.attend(step.query, *step.attention)
    assert relative(step.out, want) <= bound(step.case.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_prefill(name: str, raw: bool, backend: ModuleType) -> None:
    case = CASES[name]
    step = build(replace(case, lengths=((20, 20), (45, 7), (18, 1), (1, 1))))
    write_all(step)
    want = expected(step, raw)
    backend.prefill(step.query, step.key, step.value, *step.attention, raw=raw)
    assert relative(step.out, want) <= bound(case.dtype)


def test_queries_attend_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    step = build(Case(lengths=((40, 23), (9, 9)), softmax=Softmax(0.2, 11, 3.0), sinks=True))
    write_all(step)
    monkeypatch.setattr(generic, "_LOGITS", 4 * 40 * 5)
    generic.attend(step.query, *step.attention)
    assert relative(step.out, expected(step)) <= bound(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["D80", "D128", "columns", "wide keys", "untreated", "bf16"])
def test_bytes_that_are_written(name: str, backend: ModuleType) -> None:
    step = build(CASES[name])
    write_all(step, backend)
    layout = step.case.layout
    for request, (key, value) in enumerate(step.tokens):
        keys, values = read_cache(step.cache, step.slots(request), layout)
        for got, rotated, group in (
            (keys, rotate_keys(key, step.treatment), layout.key_dimensions),
            (values, rotate_values(value), layout.value_dimensions),
        ):
            codes, words = reference.quantise(rotated, group)
            # Rows are rotated alone or together, in sums of another order: few ties move.
            wrong = got[0] != codes.long()
            assert wrong.float().mean() < 1e-3
            assert (got[0] - codes.long()).abs().max() <= 1
            assert (got[1] != words.long() & 0xFFFF).float().mean() < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_slots_are_written(backend: ModuleType) -> None:
    layout = CacheLayout(64, 16)
    cache = torch.full((5, 2, 16, layout.token_bytes), POISON, dtype=torch.uint8)
    rows = torch.randn(2, 6, 2, 64)
    slots = torch.tensor([17, -1, 78, 3])
    backend.write(*rows, cache, slots, layout, NONE)
    planes = layout.planes(cache)
    for word, code in (
        (planes.key_words, planes.key_codes),
        (planes.value_words, planes.value_codes),
    ):
        touched = (word != -1).any(2).any(1).flatten().nonzero().flatten()
        assert touched.tolist() == [3, 17, 78]
        assert (code != POISON).any(3).any(1).flatten().nonzero().flatten().tolist() == [3, 17, 78]
    keys, values = read_cache(cache, slots[[0, 2, 3]], layout)
    back = head_rotation(64, torch.device("cpu")).double().T
    for part, got in enumerate((keys, values)):
        given = rows[part][[0, 2, 3]].double()
        # Four bits: groups of up to 64 normal numbers, steps of a third.
        assert relative(decode(*got) @ back, given) < 0.2
    before = cache.clone()
    backend.write(*rows, cache, slots[:0], layout, NONE)
    assert torch.equal(cache, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_pairand_cache(backend: ModuleType) -> None:
    layout = CacheLayout(64, 16)
    rows, slots = torch.randn(9, 3, 2, 2, 64), torch.arange(9) * 3
    key, value = rows[:, 0, 0], rows[:, 1, 0]
    plain = torch.zeros(2, 2, 16, layout.token_bytes, dtype=torch.uint8)
    wide = torch.zeros(2, 3, 3, 16, layout.token_bytes, dtype=torch.uint8)
    strided = wide[:, 1, :2]
    for cache, pair in ((plain, (key.contiguous(), value.contiguous())), (strided, (key, value))):
        backend.write(*pair, cache, slots, layout, NONE)
    assert torch.equal(plain, strided)
    assert not wide[:, (0, 2)].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [False, True])
def test_gather(backend: ModuleType, dtype: torch.dtype, columns: bool) -> None:
    layout = CacheLayout(80, 16, value_columns=columns)
    step = build(Case(layout, lengths=((70, 1),)))
    write_all(step)
    blocks = step.batch.block_table[0]
    for start, stop in ((0, 70), (16, 32), (13, 50), (40, 40), (69, 70)):
        keys, values = (torch.full((stop - start + 3, 2, 96), torch.nan, dtype=dtype) for _ in "kv")
        backend.gather(step.cache, blocks, start, stop, keys, values, layout)
        for got, codes in zip(
            (keys, values), read_cache(step.cache, step.slots(0)[start:stop], layout), strict=True
        ):
            assert torch.equal(got[: stop - start], decode(*codes).to(dtype))
            assert bool(got[stop - start :].isnan().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_a_shift_changes_nothing_where_codes_are_exact(
    backend: ModuleType, softcap: float, sinks: bool
) -> None:
    layout, heads = CacheLayout(64, 16), 2
    grid = torch.randint(-7, 9, (40, heads, 64)).float()
    grid[..., ::32], grid[..., 1::32] = -7, 8
    moves = torch.tensor([[5.0, -3.0], [-8.0, 7.0]]).repeat_interleave(32, 1)
    back = head_rotation(64, torch.device("cpu")).T
    key, shift = (grid + moves) @ back, moves @ back
    softmax, lengths = Softmax(0.02, softcap=softcap), ((40, 1),)
    base = build(Case(layout, heads, softmax=softmax, lengths=lengths, sinks=sinks, treated=False))
    outs = []
    for treatment in (NONE, KeyTreatment(shift), KeyTreatment(shift, torch.ones(heads, 64))):
        step = replace(base, treatment=treatment, out=base.out.clone())
        slots = step.slots(0)
        backend.write(key, base.tokens[0][1], base.cache, slots, layout, treatment)
        codes, words = read_cache(base.cache, slots, layout)[0]
        assert torch.equal(
            decode(codes, words), (grid + (moves if treatment is NONE else 0)).double()
        )
        assert set((words & 0xFFF0).flatten().tolist()) == {0x3C00}
        backend.attend(step.query, *step.attention)
        outs.append(step.out)
    for out in outs[1:]:
        assert relative(out, outs[0]) <= bound(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("raw", [True, False])
def test_freed_blocks_are_never_seen(backend: ModuleType, raw: bool) -> None:
    case = Case(lengths=((60, 2), (90, 3), (10, 1)), softmax=Softmax(0.2, window=20))
    step = build(case)
    write_all(step)
    want = expected(step, raw)
    for request, (length, queries) in enumerate(case.lengths):
        gone = max(0, length - queries - 20 + 1) // case.layout.block_size
        step.cache[step.batch.block_table[request, :gone].long()] = POISON
        step.batch.block_table[request, :gone] = 0
    assert (step.batch.block_table == 0).any()
    backend.prefill(step.query, step.key, step.value, *step.attention, raw=raw)
    assert relative(step.out, want) <= bound(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("raw", [True, False])
def test_padded_batches(backend: ModuleType, raw: bool) -> None:
    case = Case(lengths=((33, 1), (5, 0), (20, 2), (0, 0)))
    step = build(replace(case, lengths=(*case.lengths[:3], (1, 1))))
    write_all(step)
    want = expected(step, raw)
    padded = replace(step, case=case)
    padded.batch = padded.batch._replace(seq_lens=torch.tensor([33, 5, 20, 0], dtype=torch.int32))
    backend.prefill(step.query, step.key, step.value, *padded.attention, raw=raw)
    assert relative(step.out[:3], want[:3]) <= bound(torch.float32)
    assert bool(step.out[3:].isnan().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_nan_stays_nan(backend: ModuleType) -> None:
    step = build(Case(lengths=((20, 1), (30, 1))))
    step.tokens[0][0][4, 0, 7] = torch.nan
    step.tokens[1][1][4, 1, 7] = torch.inf
    write_all(step, backend)
    backend.attend(step.query, *step.attention)
    is_nan = step.out.isnan().all(-1)
    assert is_nan.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert bool(step.out[~is_nan].isfinite().all())


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(0, 9)), min_size=1, max_size=4),
    st.sampled_from([(32, 1, 1), (64, 2, 3), (80, 1, 5), (128, 3, 2)]),
    st.integers(0, 80),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_batch(
    lengths: list[tuple[int, int]],
    shape: tuple[int, int, int],
    window: int,
    capped: bool,
    sinks: bool,
    raw: bool,
    seed: int,
) -> None:
    size, heads, group = shape
    softmax = Softmax(0.2, window, 1.5 if capped else 0.0)
    batch = tuple((length, min(length, queries)) for length, queries in lengths)
    layout = CacheLayout(size, 16, value_columns=bool(seed % 2))
    step = build(Case(layout, heads, group, batch, softmax, seed % 3 > 0, sinks, seed=seed))
    write_all(step)
    want = expected(step, raw)
    generic.prefill(step.query, step.key, step.value, *step.attention, raw=raw)
    if len(step.out):
        assert relative(step.out, want) <= bound(torch.float32)


def flat(step: Step) -> tuple[Tensor | float | bool | None, ...]:
    """What the ops for attention end with, from the cache on."""
    layout = step.case.layout
    fields = layout.head_size, layout.block_size, layout.key_group, layout.value_group
    how = *step.batch, *fields, layout.value_columns, *step.treatment, *step.case.softmax
    return step.cache, step.out, *how, step.sinks


@pytest.mark.parametrize("name", ["D64", "untreated", "all"])
def test_opcheck(name: str) -> None:
    step = build(CASES[name])
    write_all(step)
    step.out.zero_()
    step.batch.block_table.clamp_(max=0)
    ops, layout, tail = torch.ops.quantkit, step.case.layout, flat(step)
    how = tail[7:12]
    rows = torch.zeros(2, 20, step.case.kv_heads, layout.padded_size)
    for op, inputs in (
        (ops.kv_int4_write, (*step.tokens[0], step.cache, step.slots(0) % 64, *how, *tail[12:14])),
        (ops.kv_int4_attend, (step.query, *tail)),
        (ops.kv_int4_prefill, (step.query, step.key, step.value, True, *tail)),
        (ops.kv_int4_gather, (step.cache, step.batch.block_table[0], 3, 20, *rows, *how)),
    ):
        torch.library.opcheck(
            op.default,
            inputs,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


def test_a_layer_compiles_without_graph_breaks() -> None:
    step = build(CASES["all"])
    write_all(step)
    slots = torch.cat(
        [
            step.slots(request)[length - queries :]
            for request, (length, queries) in enumerate(step.case.lengths)
        ]
    )

    def layer(query: Tensor, key: Tensor, value: Tensor, cache: Tensor) -> Tensor:
        out, more = torch.empty_like(query), torch.empty_like(query)
        rest = step.batch, step.case.layout, step.treatment, step.case.softmax, step.sinks
        write(key, value, cache, slots, step.case.layout, step.treatment)
        attend(query, cache, out, *rest)
        prefill(query, key, value, cache, more, *rest, raw=False)
        keys = torch.empty(7, cache.shape[1], step.case.layout.padded_size)
        values = torch.empty_like(keys)
        gather(cache, step.batch.block_table[0], 2, 9, keys, values, step.case.layout)
        return out + more + keys.sum() + values.sum()

    inputs = step.query, step.key, step.value, step.cache
    want = layer(*inputs)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
    assert relative(got, want) < bound(torch.float32)


def test_the_op_serves_the_device() -> None:
    step = build(CASES["all"])
    for request, (key, value) in enumerate(step.tokens):
        write(key, value, step.cache, step.slots(request), step.case.layout, step.treatment)
    want = expected(step)
    attend(step.query, *step.attention)
    assert relative(step.out, want) <= bound(torch.float32)
    step.out.fill_(torch.nan)
    prefill(step.query, step.key, step.value, *step.attention, raw=False)
    assert relative(step.out, want) <= bound(torch.float32)
    keys, values = torch.empty(2, 5, 3, 128)
    gather(step.cache, step.batch.block_table[0], 3, 8, keys, values, step.case.layout)
    assert torch.equal(
        values, decode(*read_cache(step.cache, step.slots(0)[3:8], step.case.layout)[1]).float()
    )


def test_stored_keys_are_near() -> None:
    step = build(CASES["D128"])
    write_all(step)
    for request, tokens in enumerate(step.tokens):
        for got, want in zip(stored(step, request), tokens, strict=True):
            # Four bits of normal numbers.
            assert relative(got, want) < 0.2
