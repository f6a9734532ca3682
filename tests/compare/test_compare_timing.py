"""Which engines are timed at the same time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.compare.fakes import quiet_terminal
from vllm_quantkit.bench.fitting import Fit
from vllm_quantkit.bench.requests import BenchRequest
from vllm_quantkit.compare import timing
from vllm_quantkit.compare.timing import Stopwatch
from vllm_quantkit.engine import EngineSpec

NAMES = ("16-bit", "a", "b", "c", "d", "e")


def groups(
    monkeypatch: pytest.MonkeyPatch, room: int, names: tuple[str, ...] = NAMES, **request: Any
) -> list[list[str]]:
    """Where so many engines fit."""

    def fit(specs: Mapping[str, EngineSpec], *_: object) -> Fit:
        return Fit(len(specs) <= room, "")

    monkeypatch.setattr(timing, "fit", fit)
    asked = BenchRequest(model="MODEL", **request)
    watch = Stopwatch(asked, Path("logs"), quiet_terminal()[0])
    return watch.groups({name: EngineSpec(name) for name in names})


def test_all_at_once_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert groups(monkeypatch, room=6) == [list(NAMES)]


def test_else_in_parts_that_each_have_the_16_bit_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert groups(monkeypatch, room=4) == [["16-bit", "a", "b", "c"], ["16-bit", "d", "e"]]
    assert groups(monkeypatch, room=2) == [["16-bit", name] for name in "abcde"]


def test_one_at_a_time_where_not_even_two_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert groups(monkeypatch, room=1) == [["16-bit", name] for name in "abcde"]
    assert groups(monkeypatch, room=1, names=("16-bit",)) == [["16-bit"]]


@pytest.mark.parametrize("together", [True, False])
def test_as_the_user_wishes(monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    assert groups(monkeypatch, room=2, together=together) == [list(NAMES)]
