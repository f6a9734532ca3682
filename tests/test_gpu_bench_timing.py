"""The GPU benchmark's clock: turns, medians, captured graphs, copies that no cache holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch

from benchmarks.gpu import timing


class Played:
    """A recording that notes when it was played."""

    calls = 2

    def __init__(self, name: str, log: list[str], times: Iterator[float]) -> None:
        self._name, self._log, self._times = name, log, times

    def play(self) -> Callable[[], float]:
        self._log.append(self._name)
        return lambda: next(self._times)


def test_contenders_take_turns_and_medians_are_per_call() -> None:
    log: list[str] = []
    field = {
        "a": Played("a", log, iter([4.0, 2.0, 60.0])),
        "b": Played("b", log, iter([6.0, 8.0, 10.0])),
    }
    times = timing.race(field, rounds=3)
    assert times["a"].median == 2.0
    assert times["b"] == timing.Times(4.0, 3.5, 4.5)
    # The first of a round is played once more, untimed.
    assert "".join(log) == "aab" + "bba" + "aab"


def test_recordings_go_through_all_copies_for_long_enough() -> None:
    calls = [lambda i=i: i for i in range(5)]
    assert timing.cycle(calls, floor_ms=1.0) == calls
    assert timing.cycle(calls, floor_ms=0.02) == calls * 3
    assert len(timing.cycle(calls, floor_ms=1e-9)) == 130


def test_copies_do_not_fit_the_cache() -> None:
    size = timing.cache_bytes()
    assert timing.copies_beyond_cache(10 * size) == 2
    assert timing.copies_beyond_cache(size // 3) * (size // 3) >= timing.CACHE_FACTOR * size


def test_a_cpu_recording_calls_everything() -> None:
    called: list[int] = []
    recording = timing.record([lambda i=i: called.append(i) for i in range(3)])
    assert recording.play()() >= 0
    assert called == [0, 1, 2]


class FakeGraph:
    """What capturing asks of a CUDA graph."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def capture_begin(self) -> None:
        self.said.append("begin")

    def capture_end(self) -> None:
        self.said.append("end")
        if "broken" in self.said:
            raise RuntimeError("the capture is invalid")

    def replay(self) -> None:
        self.said.append("replay")


class FakeEvent:
    """Every second event is 3 ms behind the first."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: FakeEvent) -> float:
        return 3.0


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeGraph:
    graph = FakeGraph()
    for name, value in {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "stream": lambda stream: nullcontext(),
        "Stream": lambda: "side",
        "CUDAGraph": lambda: graph,
        "Event": FakeEvent,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    timing.capture_stream.cache_clear()
    return graph


def test_calls_are_made_once_and_captured(fake_cuda: FakeGraph) -> None:
    calls = [lambda i=i: fake_cuda.said.append(i) for i in range(2)]
    recording = timing.record(calls)
    times = timing.race({"one": recording}, rounds=1)
    assert fake_cuda.said == [0, "begin", 0, 1, "end", "replay", "replay"]
    assert times["one"].median == 1.5
    fake_cuda.said.clear()
    eager = timing.record(calls, graph=False)
    assert eager.play()() == 3.0
    assert fake_cuda.said == [0, 0, 1]


def test_a_call_that_cannot_be_captured_says_why(fake_cuda: FakeGraph) -> None:
    def call() -> None:
        if "begin" in fake_cuda.said:
            fake_cuda.said.append("broken")
            raise RuntimeError("waits for the GPU")

    with pytest.raises(RuntimeError, match="waits for the GPU"):
        timing.record([call])
    assert fake_cuda.said == ["begin", "broken", "end"]
