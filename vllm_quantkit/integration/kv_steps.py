"""What a step asks of a CPU, request by request: who reads the cache, who needs a prompt's kernel.

Pure host logic: lists of numbers in, frozen descriptions out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

FEW_QUERIES = 8
"""Up to it, a request reads its 4-bit codes once for all of its queries, and needs no copy."""

BOUNDS = (1, 2, 4, FEW_QUERIES)
"""Upper bounds of queries that the op is called with: each may be a kernel of its own."""

SPLIT = 1024
"""Tokens of a context that the op sums apart, in memory of its own."""


@dataclass(frozen=True)
class Extent:
    """One request of a pass.

    Attributes:
        request: its number in the step.
        start: first position whose key any of its queries sees.
        context: first position of this step; those from `start` to it lie in the cache.
        stop: tokens of the request.
    """

    request: int
    start: int
    context: int
    stop: int

    @property
    def queries(self) -> int:
        """Positions of this step."""
        return self.stop - self.context

    @property
    def tokens(self) -> int:
        """Keys that its queries see."""
        return self.stop - self.start


@dataclass(frozen=True)
class Pass:
    """Requests whose keys and values fill the scratch at the same time.

    Attributes:
        first, last: rows of queries, keys and values.
        extents: the requests, in the order of their rows.
    """

    first: int
    last: int
    extents: tuple[Extent, ...]

    @property
    def fresh(self) -> bool:
        """True where all keys and values are this step's."""
        return all(extent.start == extent.context for extent in self.extents)

    def blocks(self, size: int) -> int:
        """Blocks of `size` tokens that hold its keys."""
        return sum(-(-extent.tokens // size) for extent in self.extents)


@dataclass(frozen=True)
class Piece:
    """Consecutive queries of a request, few enough to read the cache together.

    Attributes:
        request: its number in the step.
        first: row of the first query.
        queries: rows.
        tokens: keys that the last of them sees, if there is no window.
    """

    request: int
    first: int
    queries: int
    tokens: int


@dataclass(frozen=True)
class Step:
    """Attributes:
    few: requests whose queries read the cache directly.
    passes: the others.
    """

    few: tuple[int, ...]
    passes: tuple[Pass, ...]


def plan(
    query_start: Sequence[int], seq_lens: Sequence[int], *, window: int, capacity: int
) -> Step:
    """Every request on its own: one whose prompt is whole, beside one with a cached prefix.

    Args:
        query_start: rows, [requests + 1].
        seq_lens: tokens of each request; 0 for padding.
        window: keys a query sees, 0 for all.
        capacity: tokens that fresh requests share a pass up to.
    """
    few, others = [], []
    for request, stop in enumerate(seq_lens):
        queries = query_start[request + 1] - query_start[request]
        if not queries or not stop:
            continue
        context = stop - queries
        if queries <= FEW_QUERIES and (context or queries == 1):
            few.append(request)
        else:
            start = max(0, context - window + 1) if window else 0
            others.append(Extent(request, min(start, context), context, stop))
    return Step(tuple(few), tuple(_passes(others, query_start, capacity)))


def bound(queries: int) -> int:
    """The least of `BOUNDS` that is no less than `queries`."""
    return next(most for most in BOUNDS if queries <= most)


def pieces(
    query_start: Sequence[int], seq_lens: Sequence[int], requests: Iterable[int]
) -> list[Piece]:
    """Requests cut into `FEW_QUERIES` queries; most have fewer."""
    cut = []
    for request in requests:
        first, last = query_start[request], query_start[request + 1]
        context = seq_lens[request] - (last - first)
        for row in range(first, last, FEW_QUERIES):
            queries = min(FEW_QUERIES, last - row)
            cut.append(Piece(request, row, queries, context + row - first + queries))
    return cut


def calls(cut: Sequence[Piece], budget: int) -> Iterator[list[Piece]]:
    """Pieces that one call serves: its memory is queries times `SPLIT`s of the longest context.

    Args:
        cut: the pieces.
        budget: queries times splits of a call that has more than one piece.
    """
    group: list[Piece] = []
    for piece in cut:
        together = [*group, piece]
        longest = max(member.tokens for member in together)
        if group and FEW_QUERIES * len(together) * (longest // SPLIT + 2) > budget:
            yield group
            together = [piece]
        group = together
    if group:
        yield group


def _passes(extents: Sequence[Extent], query_start: Sequence[int], capacity: int) -> Iterator[Pass]:
    """Neighbours that have no context share a pass; one with context has its own."""
    group: list[Extent] = []

    def closed() -> Pass:
        rows = query_start[group[0].request], query_start[group[-1].request + 1]
        return Pass(*rows, tuple(group))

    for extent in extents:
        if group and not _fits(group, extent, query_start, capacity):
            yield closed()
            group = []
        group.append(extent)
    if group:
        yield closed()


def _fits(
    group: Sequence[Extent], extent: Extent, query_start: Sequence[int], capacity: int
) -> bool:
    fresh = all(member.start == member.context for member in (*group, extent))
    adjacent = query_start[group[-1].request + 1] == query_start[extent.request]
    tokens = sum(member.tokens for member in group) + extent.tokens
    return fresh and adjacent and tokens <= capacity
