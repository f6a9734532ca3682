"""A comparison that is killed goes on, and one row's failure is not another's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compare.fakes import FakeWorkbench, Killed, make_store
from vllm_quantkit.compare.result import Facts, Step
from vllm_quantkit.compare.rows import choose_rows
from vllm_quantkit.compare.running import Outcome, Runner
from vllm_quantkit.compare.work import Served
from vllm_quantkit.errors import QuantkitError

ROWS = choose_rows("fp8,awq")
ALL: frozenset[Step] = frozenset({"quality", "tasks", "speed"})

EVERYTHING = {
    *("serve 16-bit", "serve fp8", "serve awq"),
    *("open_base", "quality fp8", "quality awq"),
    *("tasks 16-bit", "tasks fp8", "tasks awq"),
    "speeds 16-bit fp8 awq",
}

CALLS = len(EVERYTHING)


def compare(bench: FakeWorkbench, folder: Path, steps: frozenset[Step] = ALL) -> list[Outcome]:
    return Runner(bench, make_store(folder)[0], steps).run(ROWS)


def complete(outcomes: list[Outcome]) -> bool:
    return all(
        o.served and o.facts and o.perplexity and o.tasks and o.timing and not o.failures
        for o in outcomes
    )


def test_everything_is_done_once(tmp_path: Path) -> None:
    bench = FakeWorkbench()
    assert complete(compare(bench, tmp_path))
    assert bench.calls == dict.fromkeys(EVERYTHING, 1)


def test_a_second_run_measures_nothing(tmp_path: Path) -> None:
    first = compare(FakeWorkbench(), tmp_path)
    again = FakeWorkbench()
    assert compare(again, tmp_path) == first
    # Checkpoints are asked for each time: their maker has a cache of its own.
    assert set(again.calls) == {"serve 16-bit", "serve fp8", "serve awq"}


@pytest.mark.parametrize("calls", range(CALLS))
def test_a_run_killed_at_any_step_goes_on_there(tmp_path: Path, calls: int) -> None:
    killed = FakeWorkbench(kill_after=calls)
    with pytest.raises(Killed):
        compare(killed, tmp_path)
    resumed = FakeWorkbench()
    assert compare(resumed, tmp_path) == compare(FakeWorkbench(), tmp_path / "other")
    kept = {name for name in killed.calls if name.split()[0] in ("quality", "tasks", "speeds")}
    assert not kept & resumed.calls.keys(), "what was measured before is not measured again"


def test_what_was_asked_for_is_done_alone(tmp_path: Path) -> None:
    bench = FakeWorkbench()
    outcomes = compare(bench, tmp_path, frozenset({"speed"}))
    assert {name.split()[0] for name in bench.calls} == {"serve", "speeds"}
    assert outcomes[1].quality is None
    assert outcomes[1].timing is not None


def test_a_new_row_is_timed_beside_the_16_bit_model_alone(tmp_path: Path) -> None:
    compare(FakeWorkbench(), tmp_path)
    bench = FakeWorkbench()
    rows = choose_rows("fp8,awq,awq+kv4")
    outcomes = Runner(bench, make_store(tmp_path)[0], ALL).run(rows)
    assert complete(outcomes)
    assert "speeds 16-bit awq+kv4" in bench.calls
    assert "quality awq" not in bench.calls


def test_other_conditions_are_measured_anew(tmp_path: Path) -> None:
    compare(FakeWorkbench(), tmp_path)
    bench = FakeWorkbench(version="2")
    assert complete(compare(bench, tmp_path))
    assert bench.calls == dict.fromkeys(EVERYTHING, 1)


@pytest.mark.parametrize(
    ("call", "row", "step"),
    [
        ("serve awq", "awq", "checkpoint"),
        ("quality awq", "awq", "quality"),
        ("tasks awq", "awq", "tasks"),
        ("time awq", "awq", "speed"),
    ],
)
def test_a_failure_is_one_rows_and_said(tmp_path: Path, call: str, row: str, step: str) -> None:
    outcomes = compare(FakeWorkbench(failing={call: "the engine refused."}), tmp_path)
    found = {o.row.name: [(f.step, f.reason) for f in o.failures] for o in outcomes}
    assert found == {"16-bit": [], "fp8": [], row: [(step, "the engine refused.")]}
    assert outcomes[1].quality is not None
    assert outcomes[1].timing is not None
    # It may have been the machine's fault: the next run tries again.
    assert complete(compare(FakeWorkbench(), tmp_path))


def test_without_log_probabilities_of_the_base_nothing_is_compared(tmp_path: Path) -> None:
    bench = FakeWorkbench(failing={"open_base": "the disk is full."})
    base, *others = compare(bench, tmp_path, frozenset({"quality"}))
    assert [f.reason for f in base.failures] == ["the disk is full."]
    for outcome in others:
        (failure,) = outcome.failures
        assert failure.reason == "the 16-bit model could not be measured: the disk is full."
    assert bench.calls["open_base"] == 1
    assert "quality fp8" not in bench.calls


def test_without_the_base_others_are_made_and_weighed(tmp_path: Path) -> None:
    bench = FakeWorkbench(failing={"serve 16-bit": "no such model."})
    base, *others = compare(bench, tmp_path)
    assert [f.step for f in base.failures] == ["checkpoint"]
    for outcome in others:
        assert outcome.facts is not None
        assert {f.step for f in outcome.failures} == {"quality", "speed"}
        assert all("16-bit model could not be served" in f.reason for f in outcome.failures)


def test_a_base_that_cannot_be_weighed_is_compared_with_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = FakeWorkbench()
    weigh = bench.facts

    def facts(served: Served) -> Facts:
        if served.spec.quantization is None:
            raise QuantkitError("no headers.")
        return weigh(served)

    monkeypatch.setattr(bench, "facts", facts)
    base, *others = compare(bench, tmp_path)
    assert [failure.step for failure in base.failures] == ["footprint"]
    assert base.perplexity is not None
    assert complete(others)


def test_the_base_alone_has_its_own_perplexity(tmp_path: Path) -> None:
    bench = FakeWorkbench()
    (base,) = Runner(bench, make_store(tmp_path)[0], frozenset({"quality"})).run(ROWS[:1])
    assert base.perplexity is not None
    assert bench.calls["base_quality"] == 1


def test_speeds_that_cannot_be_taken_at_all(tmp_path: Path) -> None:
    names = "speeds 16-bit fp8 awq"
    outcomes = compare(FakeWorkbench(failing={names: "no memory.\nmore\nlines"}), tmp_path)
    assert {f.reason for o in outcomes for f in o.failures} == {"no memory. lines"}
    assert all(o.timing is None for o in outcomes)


def test_speeds_are_kept_part_by_part(tmp_path: Path) -> None:
    bench = FakeWorkbench(together=1, kill_after=CALLS)
    with pytest.raises(Killed):
        compare(bench, tmp_path)
    resumed = FakeWorkbench(together=1)
    assert complete(compare(resumed, tmp_path))
    assert "speeds 16-bit fp8" in bench.calls
    assert "speeds 16-bit fp8" not in resumed.calls
    assert "speeds 16-bit awq" in resumed.calls


def test_a_base_that_fails_in_every_part_is_said_once(tmp_path: Path) -> None:
    bench = FakeWorkbench(together=1, failing={"time 16-bit": "no memory."})
    base, *_ = compare(bench, tmp_path, frozenset({"speed"}))
    assert [failure.reason for failure in base.failures] == ["no memory."]


def test_errors_of_pytorch_are_a_rows_failure_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    bench = FakeWorkbench()
    monkeypatch.setattr(bench, "quality", out_of_memory)
    outcomes = compare(bench, tmp_path, frozenset({"quality"}))
    assert {f.reason for o in outcomes[1:] for f in o.failures} == {"CUDA out of memory"}
