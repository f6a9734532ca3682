"""How much texts repeat themselves, and the loops they end in."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_quantkit.long_generation.repetition import border_lengths, find_loop, repetition
from vllm_quantkit.long_generation.texts import Texts


def test_repeated_grams_are_counted():
    # Of the 4-grams 1234 2341 3412 4123 1234, the last repeats the first.
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 13) == pytest.approx(9 / 10)
    assert repetition(list(range(50))) == 0
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 1, 2], gram=2) == pytest.approx(1 / 3)


def test_a_loop_starts_where_everything_behind_repeats():
    found = find_loop([9, 8, 7, *[1, 2, 3] * 20], prompt=4)

    assert found is not None
    assert (found.prompt, found.position, found.period) == (4, 4, 3)


def test_a_loop_may_be_cut_off_in_the_middle():
    found = find_loop([9, 8, 7, *[1, 2, 3] * 20, 1, 2], prompt=0)

    assert found is not None
    assert (found.position, found.period) == (4, 3)


def test_what_comes_before_belongs_to_a_loop_that_it_fits():
    # The 2 and 3 in front are the end of the period.
    found = find_loop([9, 2, 3, *[1, 2, 3] * 20], prompt=0)

    assert found is not None
    assert found.position == 2


@pytest.mark.parametrize(
    "tokens",
    [
        list(range(100)),
        [*[1, 2, 3] * 20, 9],  # it left the loop
        [1, 2, 3] * 5,  # too short to tell from a list
        list(range(20)) * 2,  # a refrain
        [],
    ],
)
def test_other_texts_are_no_loops(tokens):
    assert find_loop(tokens, prompt=0) is None


@given(st.lists(st.integers(0, 1), min_size=1, max_size=24))
def test_borders_are_those_of_the_definition(tokens):
    expected = [
        max(n for n in range(end) if tokens[:n] == tokens[end - n : end])
        for end in range(1, len(tokens) + 1)
    ]

    assert border_lengths(tokens) == expected


@given(st.lists(st.integers(0, 1), max_size=60))
def test_loops_are_those_that_trying_all_finds(tokens):
    found = find_loop(tokens, prompt=0, repeats=3, shortest=6)

    starts = (
        (start, period)
        for start in range(len(tokens) - 5)
        for period in range(1, (len(tokens) - start) // 3 + 1)
        if tokens[start:-period] == tokens[start + period :]
    )
    expected = next(starts, None)
    assert (found and (found.position - 1, found.period)) == expected


def test_ten_thousand_tokens_take_no_time():
    # Quadratic search would need 10**8 comparisons here, which takes minutes.
    drawn = random.Random(0)
    tokens = [drawn.randrange(3) for _ in range(10_000)]

    assert find_loop(tokens, prompt=0) is None


def test_what_a_model_wrote_is_described():
    texts = Texts(rows=((1, 2, 3, 4, 5), (6,) * 43, (7, 8)), ended=(False, False, True))

    found = texts.described()

    assert found.lengths == (5, 43, 2)
    assert found.median_length == 5
    assert found.ended == 1
    assert [(loop.prompt, loop.position, loop.period) for loop in found.loops] == [(1, 1, 1)]
    # 0, 39 of 40, and a text too short for any.
    assert found.repetition.value == pytest.approx(39 / 40 / 3)
