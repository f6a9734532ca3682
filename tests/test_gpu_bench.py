"""The GPU benchmark's harness, on the CPU: gate, race, budget, resumption."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import gate, problems, race, timing
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.contender import ROUNDED, SHORT_SUMS, Contender, Layer
from benchmarks.gpu.field import contenders, find
from benchmarks.gpu.peers_torch import CUBLAS, Cublas
from benchmarks.gpu.problems import BF16, Problem
from benchmarks.gpu.results import Ceilings, Results

LINEAR = Problem("tiny linear", 128, 256)
NORM = Problem("tiny norm", 256, 256, "add_rms_norm")
SILU = Problem("tiny silu", 256, 256, "silu_mul")
TINY = (LINEAR, NORM, SILU)


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "LINEAR_ROWS", (1, 33))
    monkeypatch.setattr(problems, "FUSED_ROWS", (2,))
    monkeypatch.setattr(timing, "CPU_CACHE_BYTES", 1 << 14)


class Wrong(Cublas):
    """One column too large."""

    def __call__(self, inputs: Tensor) -> Tensor:
        y = super().__call__(inputs)
        y[:, -1] *= 2
        return y


class Unwritten(Cublas):
    """One row left as it was allocated."""

    def __call__(self, inputs: Tensor) -> Tensor:
        y = super().__call__(inputs)
        out = torch.empty_like(y)
        out[1:] = y[1:]
        return out


class Missing(Layer):
    """A package that is not there."""

    def __init__(self, weight: object) -> None:
        raise ImportError("No module named 'fast'\nand more")

    def __call__(self, inputs: Tensor) -> Tensor:
        raise AssertionError


def contender(make: Callable[[Any], Layer]) -> Contender:
    return Contender("bf16", BF16, make, ROUNDED)


def test_the_gate_passes_what_is_right() -> None:
    (verdict,) = gate.judge(contender(Cublas), TINY, "cpu")
    assert verdict.reason == ""
    assert 0 < verdict.error <= ROUNDED


@pytest.mark.parametrize(("make", "reason"), [
    (Wrong, "is off by"), (Unwritten, "is off by nan"), (Missing, "ImportError: No module named"),
])  # fmt: skip
def test_the_gate_says_what_is_wrong(make: type[Layer], reason: str) -> None:
    (verdict,) = gate.judge(contender(make), TINY, "cpu")
    assert reason in verdict.reason
    assert "\n" not in verdict.reason


@pytest.mark.parametrize("one", contenders("quantkit"), ids=lambda c: f"{c.op} {c.name}")
def test_ours_pass_the_gate(one: Contender) -> None:
    (verdict,) = gate.judge(one, TINY, "cpu")
    assert verdict.reason == ""
    # A limit far above what is found would let faults through. A CPU's sums are not short.
    assert one.max_error == SHORT_SUMS or verdict.error > one.max_error / 12


def test_contenders_have_names_of_their_own() -> None:
    names = [(c.op, c.name) for c in contenders()]
    assert len(set(names)) == len(names)
    assert find(CUBLAS, "linear").make is Cublas
    with pytest.raises(KeyError, match="no contender is named 'nobody' for linear"):
        find("nobody", "linear")


def test_a_process_that_dies_keeps_its_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "LOGS", tmp_path)
    monkeypatch.setattr(gate, "SMALL", (LINEAR, replace(LINEAR, name="second")))
    line = json.dumps({"contender": "bf16", "op": "linear", "problem": LINEAR.name, "error": 0.1})
    code = f"import os; print('noise'); print({line!r}, flush=True); os.abort()"
    how = {"small": True, "jobs": 1}
    field = [contender(Cublas)]
    first, second = gate.judge_apart(field, **how, seconds=60, python=(sys.executable, "-c", code))
    assert first == gate.Verdict("bf16", "linear", LINEAR.name, 0.1)
    assert "ended with status -6" in second.reason
    slow = sys.executable, "-c", "import time; time.sleep(60)"
    first, second = gate.judge_apart(field, **how, seconds=0.3, python=slow)
    assert first.reason == second.reason == "it was not judged in time, compilation included"


# The race


def passed(field: list[Contender]) -> list[gate.Verdict]:
    return [gate.Verdict(c.name, c.op, p.name, 0.0) for c in field for p in TINY if p.op == c.op]


def run(results: Results, field: list[Contender], budget: Budget) -> list[int]:
    """Measure, and how many rows there were at each time of saving."""
    saved: list[int] = []
    command.measure(results, TINY, field, budget, lambda: saved.append(len(results.rows)))
    return saved


LIMITS = Ceilings(copy=1e10, product=1e11)
PLENTY = Budget.begin(1000)


def test_everything_is_measured_and_written_after_each_problem() -> None:
    field = contenders("quantkit W4A16 g128") + contenders(CUBLAS) + contenders("quantkit FP8 rows")
    results = Results("here", LIMITS, verdicts=passed(field))
    assert run(results, field, PLENTY) == [4, 5, 6]
    assert results.unmeasured == {}
    assert results.failures == []
    found = {(r.problem, r.contender, r.m) for r in results.rows}
    assert (LINEAR.name, CUBLAS, 33) in found
    assert all(row.low <= row.ms <= row.high and row.copies >= 2 for row in results.rows)


def test_who_fails_the_gate_is_not_timed() -> None:
    field = contenders("quantkit W4A16") + contenders(CUBLAS)
    verdicts = [replace(v, reason="off" if v.contender == CUBLAS else "") for v in passed(field)]
    results = Results("here", LIMITS, verdicts=verdicts)
    run(results, field, PLENTY)
    assert results.rows
    assert all(row.contender != CUBLAS for row in results.rows)


def test_a_contender_that_fails_later_leaves_the_others_alone() -> None:
    field = [contender(Missing), *contenders(CUBLAS)]
    results = Results("here", LIMITS, verdicts=passed(field))
    run(results, field, PLENTY)
    assert {row.contender for row in results.rows} == {CUBLAS}
    assert results.failures == [f"bf16, {LINEAR.name}: ImportError: No module named 'fast'"]


def test_when_time_runs_out_the_rest_is_listed_and_measured_later(tmp_path: Path) -> None:
    # The clock is asked before each problem and number of tokens, and for each report.
    ticks = iter([0, 1, 2, 11, *range(100, 200)])
    field = contenders(CUBLAS)
    results = Results("here", LIMITS, verdicts=passed(field))
    run(results, field, Budget.begin(10, lambda: float(next(ticks))))
    assert [row.m for row in results.rows] == [1]
    assert results.unmeasured == {LINEAR.name: [33]}
    path = tmp_path / "results.json"
    results.save(path)
    again = Results.load(path)
    assert again == results
    run(again, field, PLENTY)
    assert [row.m for row in again.rows] == [1, 33]
    assert again.unmeasured == {}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "CPU_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(race, "CPU_PRODUCT_SIZE", 64)
    found = race.measure_ceilings()
    assert found.copy > 0
    assert found.product > 0
    assert Ceilings(2e12, 1e15).least_ms(2e9, 1e9) == pytest.approx(1.0)
    assert Ceilings(2e12, 1e15).least_ms(1e3, 5e12) == pytest.approx(5.0)


def test_the_command_writes_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def judged(field: list[Contender], **_: object) -> list[gate.Verdict]:
        return [verdict for one in field for verdict in gate.judge(one, TINY, "cpu")]

    monkeypatch.setattr(command, "SMALL", TINY)
    monkeypatch.setattr(command, "judge_apart", judged)
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(
        sys, "argv", ["gpu", "--small", "--only", "quantkit W8", "--json", str(path)]
    )
    command.main()
    results = Results.load(path)
    names = {"quantkit W8A16", "quantkit W8A8", "quantkit W8A8, product"}
    assert {r.contender for r in results.rows} == names
    assert path.with_suffix(".md").read_text().startswith("# Kernels on a GPU")
    assert "6 measurements" in capsys.readouterr().out


def test_what_breaks_the_race_off_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nand advice")

    monkeypatch.setattr(command, "judge_apart", lambda *_, **__: [])
    monkeypatch.setattr(command, "measure", broken)
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--small", "--json", str(path)])
    command.main()
    failure = "The race broke off: CUDA error: an illegal memory access"
    assert Results.load(path).failures == [failure]
    assert f"- {failure}" in path.with_suffix(".md").read_text()
