"""The CPU kernels of the 4-bit cache: on AVX-512 and on narrower vectors, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit_kernels.cpu.host import host_features
from quantkit_kernels.kv_int4 import CacheLayout, KeyTreatment, Softmax, cpu, cpu_plan, reference
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
)

ROWS = tuple(name for name, case in CASES.items() if not case.layout.value_columns)
FEWER = ((33, 1), (16, 1), (1, 1), (50, 2))
"""Lengths for large heads, whose kernels for many rows take a second to compile."""


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Uninitialised floats are NaN, uninitialised bytes 255; one thread."""
    torch.use_deterministic_algorithms(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[set[str]], None]]:
    """Hides features of this machine from the choice of arithmetic."""

    def hide(names: set[str]) -> None:
        monkeypatch.setattr(cpu_plan, "host_features", lambda: host_features() - names)
        cpu_plan.plan.cache_clear()

    yield hide
    cpu_plan.plan.cache_clear()


def write_all(step: Step) -> None:
    """Every token of every request."""
    for request, (key, value) in enumerate(step.tokens):
        slots = step.slots(request)
        cpu.write(key, value, step.cache, slots, step.case.layout, step.treatment)


def check(step: Step) -> None:
    """Attention over what was written is that of float64."""
    want = expected(step)
    cpu.attend(step.query, *step.attention)
    if len(step.out):
        assert relative(step.out, want) <= bound(step.case.dtype)


@pytest.mark.parametrize("name", ROWS)
def test_attention_over_what_was_written(name: str) -> None:
    case = CASES[name]
    if case.layout.head_size > 128 or case.group > 8:
        case = replace(case, lengths=FEWER)
    step = build(case)
    write_all(step)
    check(step)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(32, torch.float16), (72, torch.bfloat16), (160, torch.float16), (224, torch.bfloat16)],
)
def test_other_head_sizes_in_16_bits(size: int, dtype: torch.dtype) -> None:
    softmax = Softmax(size**-0.5, 30)
    step = build(Case(CacheLayout(size, 48), 1, 3, FEWER, softmax, sinks=True, dtype=dtype))
    write_all(step)
    check(step)


@pytest.mark.parametrize(
    ("window", "dtype"),
    [(0, torch.float32), (1100, torch.float32), (0, torch.bfloat16), (100, torch.bfloat16)],
)
def test_contexts_of_several_splits(dtype: torch.dtype, window: int) -> None:
    lengths = ((2100, 2), (1024, 1), (1025, 2))
    step = build(Case(kv_heads=1, lengths=lengths, softmax=Softmax(0.1, window), dtype=dtype))
    write_all(step)
    check(step)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_bits(dtype: torch.dtype, threads: int) -> None:
    step = build(Case(lengths=((2100, 2), (700, 1)), dtype=dtype))
    write_all(step)
    cpu.attend(step.query, *step.attention)
    torch.set_num_threads(threads)
    cache = step.cache.clone().fill_(POISON)
    again = replace(step, cache=cache, out=torch.full_like(step.out, torch.nan))
    write_all(again)
    assert torch.equal(cache, step.cache)
    cpu.attend(again.query, *again.attention)
    assert torch.equal(again.out, step.out)


def test_a_request_has_the_same_bits_in_any_batch() -> None:
    step = build(Case(lengths=((1500, 1), (300, 1), (40, 1))))
    write_all(step)
    cpu.attend(step.query, *step.attention)
    for request, length in enumerate((1500, 300, 40)):
        alone = step.batch._replace(
            block_table=step.batch.block_table[request : request + 1],
            seq_lens=step.batch.seq_lens[request : request + 1],
            query_start=torch.tensor([0, 1], dtype=torch.int32),
            max_seq_len=length,
        )
        one = replace(step, batch=alone, out=torch.full_like(step.out, torch.nan))
        cpu.attend(step.query[request:], *one.attention)
        assert torch.equal(one.out[0], step.out[request])


def test_the_same_bits_with_any_upper_bound() -> None:
    step = build(Case(lengths=((90, 1), (40, 1))))
    write_all(step)
    cpu.attend(step.query, *step.attention)
    longer = step.batch._replace(max_seq_len=5000)
    again = replace(step, batch=longer, out=torch.full_like(step.out, torch.nan))
    cpu.attend(again.query, *again.attention)
    assert torch.equal(again.out, step.out)


@pytest.mark.parametrize(
    ("name", "hidden"),
    [("bf16", "avx512vnni"), ("bf16", "avx512f"), ("D64", "avx512f"), ("G7", "avx512f")],
)
def test_other_arithmetic(name: str, hidden: str, without: Callable[[set[str]], None]) -> None:
    without({hidden, "avx512vnni"})
    step = build(CASES[name])
    write_all(step)
    check(step)


@pytest.mark.parametrize("name", ["D64", "D96", "D256", "wide keys", "bf16"])
def test_bytes_that_are_written(name: str) -> None:
    step = build(CASES[name])
    write_all(step)
    layout = step.case.layout
    want = torch.full_like(step.cache, POISON)
    for request, (key, value) in enumerate(step.tokens):
        reference.write(key, value, want, step.slots(request), layout, step.treatment)
        for got, wanted in zip(
            read_cache(step.cache, step.slots(request), layout),
            read_cache(want, step.slots(request), layout),
            strict=True,
        ):
            # Rotations add in another order: few ties move.
            assert (got[0] - wanted[0]).abs().max() <= 1
            assert (got[0] != wanted[0]).float().mean() < 1e-3
            assert (got[1] != wanted[1]).float().mean() < 1e-2
    untouched = (want == POISON).all(-1)
    assert torch.equal(step.cache[untouched], want[untouched])


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_references_bytes_where_rotations_are_exact(dtype: torch.dtype, size: int) -> None:
    """Whole numbers, and a matrix whose numbers are powers of two; ties, huge and tiny groups."""
    layout = CacheLayout(size, 16)
    rows = torch.randint(-9, 10, (2, 32, 3, size)).to(dtype)
    rows[:, 1], rows[:, 2, :, 1:] = 0, 0
    rows[0, 3] *= 8192
    rows[:, 4] = 2.0**-14
    slots = torch.randperm(32)
    got = torch.full((2, 3, 16, layout.token_bytes), POISON, dtype=torch.uint8)
    want = got.clone()
    for backend, cache in ((cpu, got), (reference, want)):
        backend.write(*rows, cache, slots, layout, NONE)
    assert torch.equal(got, want)


def test_groups_that_no_scale_covers_are_nan() -> None:
    layout = CacheLayout(64, 16)
    rows = torch.zeros(2, 5, 1, 64)
    rows[0, 0, 0, 3], rows[1, 1, 0, 5] = torch.nan, torch.inf
    rows[0, 2, 0, 0], rows[1, 3, 0, 0], rows[0, 4, 0, 0] = 1e7, 1e38, 3.9e6
    got = torch.full((1, 1, 16, layout.token_bytes), POISON, dtype=torch.uint8)
    want = got.clone()
    cpu.write(*rows, got, torch.arange(5), layout, NONE)
    reference.write(*rows, want, torch.arange(5), layout, NONE)
    assert torch.equal(got, want)


def test_only_slots_are_written_from_strided_rows_to_a_strided_cache() -> None:
    layout = CacheLayout(80, 16)
    rows, slots = torch.randn(9, 3, 2, 2, 80), torch.tensor([17, -1, 30, 3, -5])
    key, value = rows[:, 0, 0], rows[:, 1, 0]
    wide = torch.full((2, 3, 3, 16, layout.token_bytes), POISON, dtype=torch.uint8)
    strided, plain = wide[:, 1, :2], wide[:, 1, :2].clone()
    cpu.write(key, value, strided, slots, layout, NONE)
    cpu.write(key[[0, 2, 3]].contiguous(), value[[0, 2, 3]], plain, slots[[0, 2, 3]], layout, NONE)
    assert torch.equal(strided, plain)
    assert bool((wide[:, (0, 2)] == POISON).all())
    assert bool((wide[:, :, 2] == POISON).all())
    touched = (layout.planes(strided).key_words != -1).any(2).any(1).flatten().nonzero().flatten()
    assert touched.tolist() == [3, 17, 30]
    before = plain.clone()
    cpu.write(key, value, plain, slots[:0], layout, NONE)
    assert torch.equal(plain, before)


def test_queries_and_results_are_strided() -> None:
    step = build(Case(lengths=((33, 1), (20, 2)), dtype=torch.bfloat16))
    write_all(step)
    want = expected(step)
    rows = torch.full((3, 9, 64), torch.nan, dtype=torch.bfloat16)
    rows[:, 2:6] = step.query
    wide = torch.full((3, 5, 64), 7.0, dtype=torch.bfloat16)
    strided = replace(step, out=wide[:, :4])
    cpu.attend(rows[:, 2:6], *strided.attention)
    assert relative(wide[:, :4], want) <= bound(torch.bfloat16)
    assert bool((wide[:, 4] == 7).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [80, 128])
def test_gather(size: int, dtype: torch.dtype) -> None:
    layout = CacheLayout(size, 16)
    step = build(Case(layout, lengths=((70, 1),)))
    write_all(step)
    blocks, shape = step.batch.block_table[0], (2, layout.padded_size)
    for start, stop in ((0, 70), (16, 32), (13, 50), (40, 40), (69, 70)):
        keys, values = (
            torch.full((stop - start + 3, *shape), torch.nan, dtype=dtype) for _ in "kv"
        )
        cpu.gather(step.cache, blocks, start, stop, keys, values, layout)
        wanted = read_cache(step.cache, step.slots(0)[start:stop], layout)
        for got, codes in zip((keys, values), wanted, strict=True):
            assert torch.equal(got[: stop - start], decode(*codes).to(dtype))
            assert bool(got[stop - start :].isnan().all())


def test_gather_of_another_dtype_and_strides() -> None:
    step = build(Case(lengths=((40, 1),)))
    write_all(step)
    keys = torch.empty(40, 4, 64, dtype=torch.float16)[:, ::2]
    values = torch.empty(40, 64, 2).transpose(1, 2)
    cpu.gather(step.cache, step.batch.block_table[0], 0, 40, keys, values, step.case.layout)
    wanted = read_cache(step.cache, step.slots(0), step.case.layout)
    assert torch.equal(keys, decode(*wanted[0]).half())
    assert torch.equal(values, decode(*wanted[1]).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_freed_blocks_are_never_seen(dtype: torch.dtype) -> None:
    case = Case(lengths=((60, 2), (90, 3), (10, 1)), softmax=Softmax(0.2, window=20), dtype=dtype)
    step = build(case)
    write_all(step)
    want = expected(step)
    for request, (length, queries) in enumerate(case.lengths):
        gone = max(0, length - queries - 20 + 1) // case.layout.block_size
        step.cache[step.batch.block_table[request, :gone].long()] = POISON
        step.batch.block_table[request, :gone] = 0
    assert (step.batch.block_table == 0).any()
    cpu.attend(step.query, *step.attention)
    assert relative(step.out, want) <= bound(dtype)


def test_padded_batches() -> None:
    case = Case(lengths=((33, 1), (5, 0), (20, 2), (0, 0)))
    step = build(replace(case, lengths=(*case.lengths[:3], (1, 1))))
    write_all(step)
    want = expected(step)
    padded = replace(step, case=case)
    padded.batch = padded.batch._replace(seq_lens=torch.tensor([33, 5, 20, 0], dtype=torch.int32))
    cpu.attend(step.query, *padded.attention)
    assert relative(step.out[:3], want[:3]) <= bound(torch.float32)
    assert bool(step.out[3:].isnan().all())


def test_no_requests() -> None:
    step = build(Case(lengths=((1, 0),)))
    cpu.attend(step.query, *step.attention)
    nothing = step.batch._replace(
        block_table=step.batch.block_table[:0],
        seq_lens=step.batch.seq_lens[:0],
        query_start=step.batch.query_start[:1],
    )
    cpu.attend(step.query, *replace(step, batch=nothing).attention)
    assert step.out.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_nan_stays_nan(dtype: torch.dtype) -> None:
    step = build(Case(lengths=((20, 1), (30, 1), (25, 1)), dtype=dtype))
    step.tokens[0][0][4, 0, 7] = torch.nan
    step.tokens[1][1][4, 1, 7] = torch.inf
    step.query[2, 3, 5] = torch.nan
    write_all(step)
    cpu.attend(step.query, *step.attention)
    is_nan = step.out.isnan().all(-1).tolist()
    assert is_nan == [[True, True, False, False], [False, False, True, True], [False] * 3 + [True]]
    assert bool(step.out[~step.out.isnan().all(-1)].isfinite().all())


def test_a_later_token_that_is_nan_is_not_seen_by_earlier_queries() -> None:
    step = build(Case(lengths=((20, 3),), treated=False))
    step.tokens[0][0][19], step.tokens[0][1][18] = torch.nan, torch.nan
    write_all(step)
    cpu.attend(step.query, *step.attention)
    assert step.out.isnan().all(-1).all(-1).tolist() == [False, True, True]
    assert bool(step.out[0].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_logits_and_a_query_of_zeros(dtype: torch.dtype) -> None:
    """Differences of logits beyond any exponent of float32; equal logits."""
    step = build(Case(lengths=((300, 1), (130, 1)), treated=False, dtype=dtype))
    step.query[0] *= 60
    step.query[1] = 0
    write_all(step)
    want = expected(step)
    cpu.attend(step.query, *step.attention)
    # Logits of hundreds are off by hundreds of the roundings of what is summed.
    assert relative(step.out, want) <= max(bound(dtype), 1e-4)


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(0, 2)), min_size=1, max_size=5),
    st.sampled_from([(64, 1, 2), (80, 2, 3)]),
    st.integers(0, 80),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_any_batch(
    lengths: list[tuple[int, int]],
    shape: tuple[int, int, int],
    window: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    size, heads, group = shape
    batch = tuple((length, min(length, queries)) for length, queries in lengths)
    layout = CacheLayout(size, 16)
    softmax = Softmax(0.2, window)
    step = build(Case(layout, heads, group, batch, softmax, dtype=dtype, seed=seed))
    # One kernel serves all batches.
    step.batch = step.batch._replace(max_query_len=2)
    write_all(step)
    check(step)


def test_columns_are_refused() -> None:
    step = build(CASES["columns"])
    rows = torch.empty(50, 2, 96)
    with pytest.raises(ValueError, match="value_columns is True"):
        cpu.attend(step.query, *step.attention)
    with pytest.raises(ValueError, match="value_columns is True"):
        cpu.write(*step.tokens[0], step.cache, step.slots(0), step.case.layout, KeyTreatment())
    with pytest.raises(ValueError, match="value_columns is True"):
        cpu.gather(step.cache, step.slots(0).int(), 0, 1, rows, rows, step.case.layout)
