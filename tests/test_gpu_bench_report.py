"""What the GPU benchmark computes, and what it makes of the times: goals, report, picture."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import gate, problems
from benchmarks.gpu.field import contenders
from benchmarks.gpu.goals import BANDWIDTH, GOALS, Goal, everywhere, outcome, rows
from benchmarks.gpu.peers_torch import CUBLAS
from benchmarks.gpu.picture import draw
from benchmarks.gpu.problems import Problem
from benchmarks.gpu.report import markdown
from benchmarks.gpu.results import Ceilings, Results, Row

LINEAR = Problem("tiny linear", 128, 256)
SILU = Problem("tiny silu", 256, 256, "silu_mul")
ALL_ROWS = (*problems.LINEAR_ROWS, *problems.FUSED_ROWS)


def test_sizes_are_those_of_the_models() -> None:
    """hidden, heads, key heads, head size, inner size, from the models' configurations."""
    models = {
        "Llama-3-8B": (4096, 32, 8, 128, 14336),
        "Llama-3-70B": (8192, 64, 8, 128, 28672),
        "Qwen3-8B": (4096, 32, 8, 128, 12288),
        "Qwen3-32B": (5120, 64, 8, 128, 25600),
    }
    sizes = set()
    for hidden, heads, kv, head, inner in models.values():
        sizes |= {((heads + 2 * kv) * head, hidden), (hidden, heads * head)}
        sizes |= {(2 * inner, hidden), (hidden, inner)}
    measured = [(p.n, p.k) for p in problems.PROBLEMS if p.op == "linear"]
    assert sorted(measured) == sorted(sizes)


@pytest.mark.parametrize("kind", [
    problems.W4, problems.W4_G32, problems.W8, problems.FP8, problems.BLOCK_FP8, problems.INT8,
])  # fmt: skip
def test_random_weights_mean_something(kind: problems.Kind) -> None:
    weight = kind.random(256, 512, torch.Generator().manual_seed(0))
    dense = weight.dequantize()
    assert dense.isfinite().all()
    # A product of normal activations is about as large as they are.
    assert 0.05 < float(dense.norm(dim=1).mean()) < 1
    if kind.block:
        blocks = weight.scales.view(2, 128, 4)
        assert torch.equal(blocks, blocks[:, :1].expand_as(blocks))
    assert weight.scales.shape[1] == 512 // (kind.group_size or 512)


def test_least_bytes() -> None:
    assert problems.W4.nbytes(128, 256) == 128 * 256 / 2 + 128 * 2 * 2
    assert problems.W4_G32.nbytes(128, 256) == 128 * 256 / 2 + 128 * 8 * 3
    assert problems.BLOCK_FP8.nbytes(128, 256) == 128 * 256 + 2 * 2
    assert problems.BF16.nbytes(128, 256) == 2 * 128 * 256
    assert problems.moved_bytes(SILU, problems.FP8, 3) == 3 * 256 * (4 + 1)
    assert problems.operations(LINEAR, 3) == 2 * 3 * 128 * 256


def row(contender: str, m: int, ms: float, problem: str = "p", **more: Any) -> Row:
    fields = {"op": "linear", "kind": "k", "n": 8, "k": 8, "nbytes": 8e6, "operations": 1e9}
    rest = {"low": ms, "high": ms, "copies": 2, "graph": True}
    return Row(problem=problem, contender=contender, m=m, ms=ms, **{**fields, **rest, **more})


def test_a_goal_counts_the_worst_or_the_mean() -> None:
    results = Results("here", Ceilings(1e10, 1e12))
    results.rows = [
        row("ours", 1, 1.0), row("a", 1, 4.0), row("b", 1, 2.0),
        row("ours", 2, 1.0), row("a", 2, 8.0),
        row("ours", 64, 1.0), row("a", 64, 0.1),
        row("ours", 3, 1.0),
    ]  # fmt: skip
    few = Goal("ours", "few", rows(1, 2, 3), 2.5, ("a", "b"))
    found = outcome(few, results)
    assert (found.worst, found.count, found.met) == (2.0, 2, "**no**")
    assert found.mean == pytest.approx(4.0)
    assert outcome(replace(few, mean=True), results).met == "yes"
    assert outcome(replace(few, peers=("nobody",)), results).met == "not measured"
    share = outcome(Goal("ours", "", everywhere, 0.8, BANDWIDTH), results)
    assert share.worst == pytest.approx(0.8)
    assert share.met == "yes"
    assert outcome(replace(few, op="silu_mul"), results).count == 0


def test_goals_speak_of_contenders_and_problems_there_are() -> None:
    names = {(c.op, c.name) for c in contenders()}
    for goal in GOALS:
        assert {(goal.op, name) for name in (goal.kernel, *goal.peers)} <= names
        made = [
            row(goal.kernel, m, 1.0, p.name, n=p.n, k=p.k)
            for p in problems.PROBLEMS
            for m in ALL_ROWS
            if p.op == goal.op
        ]
        assert any(goal.where(one) for one in made), goal


def some_results() -> Results:
    results = Results("An H200; torch 2", Ceilings(4e12, 8e14))
    results.rows = [
        row("quantkit W4A16 g128", 1, 0.01, n=28672, k=4096, nbytes=6e7, operations=2.3e8),
        row(CUBLAS, 1, 0.05, n=28672, k=4096, nbytes=2.4e8, operations=2.3e8, graph=False),
    ]
    results.verdicts = [
        gate.Verdict("Marlin", "linear", "p", math.nan, "ImportError: no vllm"),
        gate.Verdict(CUBLAS, "linear", "p", 2e-3),
        gate.Verdict(CUBLAS, "linear", "q", 3e-3),
    ]
    results.unmeasured = {"q": [4, 1]}
    results.failures = ["Machete, p: RuntimeError: broken"]
    return results


def test_the_report_has_figures_and_all_that_is_missing() -> None:
    text = markdown(some_results())
    assert "An H200; torch 2. Measured in the same run: copies move 4.00 TB/s" in text
    assert "| quantkit W4A16 g128 | 0.0100 (150%) |" in text
    assert f"| {CUBLAS} | 0.0500 (120%) no graph |" in text
    first = "| quantkit W4A16 g128 | M = 1 to 16, N K of 58 M and more |"
    assert f"{first} share of copy bandwidth | 0.80 | 1.50 | 1.50 | 1 | yes |" in text
    assert f"{first} speed over {CUBLAS} | 3.00 | 5.00 | 5.00 | 1 | yes |" in text
    assert "- Marlin (p): ImportError: no vllm\n" in text
    assert f"| linear | {CUBLAS} | 3.0e-03 |" in text
    assert "- Machete, p: RuntimeError: broken\n" in text
    assert "- q at M = 1, 4: time ran out" in text


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(some_results(), tmp_path / "roofline.svg")
    assert "TFLOP/s" in (tmp_path / "roofline.svg").read_text()
