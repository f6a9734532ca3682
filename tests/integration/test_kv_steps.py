"""Which requests of a step read the cache, which need 16-bit copies, and what shares a call."""

from __future__ import annotations

import pytest

from vllm_quantkit.integration.kv_steps import (
    BOUNDS,
    FEW_QUERIES,
    SPLIT,
    Extent,
    Pass,
    Piece,
    bound,
    calls,
    pieces,
    plan,
)


def test_every_request_is_judged_by_itself():
    """A prompt that is whole, one with a cached prefix, a decoding one, drafts, padding."""
    query_start = [0, 200, 272, 273, 277, 277, 277]
    seq_lens = [200, 200, 90, 50, 0, 0]

    step = plan(query_start, seq_lens, window=0, capacity=1000)

    assert step.few == (2, 3)
    assert step.passes == (
        Pass(0, 200, (Extent(0, 0, 0, 200),)),
        Pass(200, 272, (Extent(1, 0, 128, 200),)),
    )
    assert [one.fresh for one in step.passes] == [True, False]


def test_fresh_neighbours_share_a_pass_up_to_its_capacity():
    step = plan([0, 40, 41, 91, 151], [40, 9, 50, 60], window=0, capacity=100)

    assert step.few == (1,)
    assert [(one.first, one.last) for one in step.passes] == [(0, 40), (41, 91), (91, 151)]

    adjacent = plan([0, 40, 90, 150], [40, 50, 60], window=0, capacity=100)

    assert [(one.first, one.last) for one in adjacent.passes] == [(0, 90), (90, 150)]
    assert adjacent.passes[0].blocks(32) == 2 + 2


def test_a_window_leaves_out_what_no_query_sees():
    """The first query of positions 300 to 363 sees 100 keys: 201 to 300."""
    (one,) = plan([0, 64], [364], window=100, capacity=1000).passes

    assert one.extents == (Extent(0, 201, 300, 364),)
    assert one.extents[0].tokens == 163
    assert one.extents[0].queries == 64


def test_a_window_of_one_token_needs_no_context():
    (one,) = plan([0, 64], [364], window=1, capacity=1000).passes
    assert one.fresh


@pytest.mark.parametrize(("queries", "most"), [(1, 1), (2, 2), (3, 4), (8, 8)])
def test_kernels_are_few(queries, most):
    assert bound(queries) == most
    assert BOUNDS[-1] == FEW_QUERIES


def test_long_requests_read_the_cache_in_pieces_that_see_what_they_should():
    cut = pieces([0, 1, 20, 20], [30, 19, 7], [0, 1])

    assert cut == [Piece(0, 0, 1, 30), Piece(1, 1, 8, 8), Piece(1, 9, 8, 16), Piece(1, 17, 3, 19)]


def test_calls_stay_within_their_memory():
    cut = [Piece(i, i, 1, tokens) for i, tokens in enumerate([10, 10, 5 * SPLIT, 10, 10])]

    assert [len(group) for group in calls(cut, budget=10**6)] == [5]
    # Two short requests have 2 splits each; beside the long one each counts 7.
    assert [len(group) for group in calls(cut, budget=4 * FEW_QUERIES)] == [2, 1, 2]
