"""Milliseconds per call, of CUDA graphs that take turns.

    copies = copies_beyond_cache(layer_bytes)            # of the data, so that no cache holds it
    ours = record(cycle([partial(linear, x, w) for w in ours_copies], floor_ms))
    peer = record(cycle([partial(other, x, w) for w in peer_copies], floor_ms))
    times = race({"ours": ours, "peer": peer})           # {"ours": Times(median, low, high), ...}

Without a GPU, the same functions time calls on the CPU, one after the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import cycle as endlessly
from itertools import islice
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")

ROUNDS = 9
"""Turns of every contender; an odd number, so that the median is one of them."""

CACHE_FACTOR = 4
"""Copies of the data hold this many times what the L2 cache does."""

CPU_CACHE_BYTES = 1 << 20
"""Stands for the L2 cache where there is no GPU: times on a CPU only try the harness out."""

RECORDING_MS = 0.3
"""A recording lasts at least this long at the GPU's limits, a hundred times an event's error."""

MAX_CALLS = 128
"""Of a recording, unless there are more copies: capturing a call takes 0.1 ms of the host."""

Call = Callable[[], object]
"""Enqueues work on the current stream."""


@dataclass(frozen=True)
class Times:
    """Milliseconds per call: the median, and the quartiles around it."""

    median: float
    low: float
    high: float


class Recording(Protocol):
    """Calls that can be played again and again."""

    @property
    def calls(self) -> int:
        """How many calls it holds."""

    def play(self) -> Callable[[], float]:
        """Enqueue all calls; the result waits for them and returns their milliseconds."""


def cache_bytes() -> int:
    """Size of the L2 cache."""
    if not torch.cuda.is_available():
        return CPU_CACHE_BYTES
    return int(torch.cuda.get_device_properties().L2_cache_size)


def copies_beyond_cache(nbytes: int) -> int:
    """Copies of data of `nbytes` that hold several times what the L2 cache does; at least 2."""
    return max(2, -(-CACHE_FACTOR * cache_bytes() // nbytes))


def cycle(copies: Sequence[Call], floor_ms: float) -> list[Call]:
    """Whole rounds over `copies`, so many that a recording of them is long enough to time.

    Args:
        copies: the same call on each copy of its data.
        floor_ms: the least milliseconds a call may take.
    """
    wanted = min(RECORDING_MS / floor_ms, MAX_CALLS)
    rounds = max(1, -(-int(wanted) // len(copies)))
    return list(islice(endlessly(copies), rounds * len(copies)))


def record(calls: Sequence[Call], *, graph: bool = True) -> Recording:
    """Make a recording, as a CUDA graph where there is a GPU and `graph` is true.

    Raises:
        RuntimeError: a call does what cannot be captured, as waiting for the GPU.
    """
    if not torch.cuda.is_available():
        return CpuRecording(calls)
    if graph:
        return GraphRecording(calls)
    calls[0]()
    return EagerRecording(calls)


def race(field: Mapping[str, Recording], rounds: int = ROUNDS) -> dict[str, Times]:
    """Play the recordings in turns, each round in another order."""
    names = list(field)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds if names else 0):
        first = turn % len(names)
        order = names[first:] + names[:first]
        # Untimed: while the GPU is at it, the host enqueues those that are timed without a gap.
        field[order[0]].play()
        pending = [(name, field[name].play()) for name in order]
        for name, wait in pending:
            taken[name].append(wait() / field[name].calls)
    return {name: summarise(times) for name, times in taken.items()}


def summarise(times: Sequence[float]) -> Times:
    """Median and quartiles."""
    if len(times) < 2:
        return Times(times[0], times[0], times[0])
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Times(median, low, high)


class CpuRecording:
    """Calls timed by the host's clock."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls

    @property
    def calls(self) -> int:
        """How many calls it holds."""
        return len(self._calls)

    def play(self) -> Callable[[], float]:
        """Call all."""
        start = time.perf_counter()
        for call in self._calls:
            call()
        taken = 1e3 * (time.perf_counter() - start)
        return lambda: taken


class EagerRecording:
    """Calls that no graph can hold: the host's overhead counts where it is the longer."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls

    @property
    def calls(self) -> int:
        """How many calls it holds."""
        return len(self._calls)

    def play(self) -> Callable[[], float]:
        """Enqueue all calls between two events."""
        return between_events(self._enqueue)

    def _enqueue(self) -> None:
        for call in self._calls:
            call()


class GraphRecording:
    """Calls in one CUDA graph. The first is made before, so that kernels are compiled by then."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._count = len(calls)
        with torch.cuda.stream(capture_stream()):
            calls[0]()

        def enqueue() -> None:
            for call in calls:
                call()

        self._graph, _ = capture(enqueue)

    @property
    def calls(self) -> int:
        """How many calls it holds."""
        return self._count

    def play(self) -> Callable[[], float]:
        """Replay the graph between two events."""
        return between_events(self._graph.replay)


@cache
def capture_stream() -> torch.cuda.Stream:
    """One for all captures: libraries keep their workspaces by stream."""
    return torch.cuda.Stream()


def capture(enqueue: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of what a function enqueues, and what it returns: tensors that a replay writes.

    Unlike `torch.cuda.graph`, it neither collects garbage nor gives memory back, which would take
    longer than all else here.

    Raises:
        RuntimeError: the function does what cannot be captured, as waiting for the GPU.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(capture_stream()):
        graph.capture_begin()
        try:
            result = enqueue()
        except BaseException:
            with suppress(RuntimeError):  # the capture is broken already
                graph.capture_end()
            raise
        graph.capture_end()
    return graph, result


def between_events(enqueue: Callable[[], object]) -> Callable[[], float]:
    """Enqueue work between two events; the result waits and returns the milliseconds between."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    enqueue()
    end.record()

    def wait() -> float:
        end.synchronize()
        return float(start.elapsed_time(end))

    return wait
