"""The GPU serving benchmark: models that are a config, engines that fail, time that runs out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import serving, serving_worker
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.serving_models import AWQ, BF16, EIGHT_B, GROUPS, TINY, make_specs
from benchmarks.gpu.serving_report import GOALS, LONG, ONE, Speeds, ratio, report
from vllm_quantkit.bench.plan import SHORT_PROMPT
from vllm_quantkit.engine import Engine, EngineError, EngineSpec
from vllm_quantkit.schemes import get_method

PLENTY = Budget.begin(1000)


class FakeEngine(serving.GpuEngine):
    """Answers at once; dies when it is asked for `dies_at`."""

    def __init__(self, rate: float, dies_at: str = "") -> None:
        self._rate, self._dies_at = rate, dies_at
        self.asked: list[str] = []

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        self.asked.append(op)
        if op == self._dies_at:
            raise EngineError("the engine stopped; its log ends:\nRuntimeError: out of memory\nbye")
        if op == "decode":
            return {"tokens_per_second": self._rate, "gap": 0.1, "gap_tail": 0.2}
        return {"short": 0.5, "full": 0.5 + (request["tokens"] - SHORT_PROMPT) / self._rate}


def asked(speeds: Speeds, engines: dict[str, serving.GpuEngine], budget: Budget) -> int:
    """Ask everything twice, and how often it was saved."""
    saved: list[None] = []
    measures = serving.measures(TINY)
    serving.ask_all(engines, measures, 2, budget, speeds, lambda: saved.append(None))
    return len(saved)


def test_every_engine_has_a_model(tmp_path: Path) -> None:
    specs = make_specs(EIGHT_B, tmp_path)
    assert set(specs) == {name for group in GROUPS for name in group}
    for name, spec in specs.items():
        content = json.loads((Path(spec.model) / "config.json").read_text())
        assert content["hidden_size"] == 4096
        stored = content.get("quantization_config")
        assert spec.max_model_len <= content["max_position_embeddings"]
        assert dict(spec.options)["load_format"] == "dummy"
        if stored is not None and spec.quantization is not None:
            rules = get_method(spec.quantization).rules(stored)
            assert rules.scheme_for("model.layers.31.mlp.down_proj") is not None
            assert rules.scheme_for("lm_head") is None
        assert (stored is not None) == any(
            word in name for word in ("AWQ", "awq", "W8A8", "smooth")
        )


def test_goals_speak_of_engines_and_measures_there_are() -> None:
    names, labels = {n for group in GROUPS for n in group}, set(serving.measures(EIGHT_B))
    assert {ONE, LONG, "decode, 128 sequences", "prefill, 8192 tokens"} <= labels
    for goal in GOALS:
        assert {goal.ours, goal.peer} <= names
        assert goal.measure in labels


def test_speeds_are_medians() -> None:
    speeds = Speeds("here", {"m": {"a": [3.0, 9.0, 4.0]}})
    assert speeds.per_second("m", "a") == 4.0
    assert speeds.per_second("m", "b") is None
    assert speeds.per_second("n", "a") is None


def test_engines_are_asked_in_turns_and_one_that_dies_leaves_the_rest(tmp_path: Path) -> None:
    speeds = Speeds("here")
    engines = {BF16: FakeEngine(100.0), AWQ: FakeEngine(260.0, dies_at="prefill")}
    assert asked(speeds, engines, PLENTY) == len(serving.measures(TINY))
    assert list(engines) == [BF16]
    assert len(speeds.rates[ONE][BF16]) == 2  # the run that warms up is not counted
    assert speeds.per_second("prefill, 128 tokens", BF16) == pytest.approx(100.0)
    assert speeds.failures == {AWQ: "RuntimeError: out of memory"}
    assert speeds.per_second(ONE, BF16) == pytest.approx(100.0)
    goal = next(goal for goal in GOALS if (goal.ours, goal.peer) == (AWQ, BF16))
    assert ratio(speeds, goal) == pytest.approx(2.6)
    path = tmp_path / "speeds.json"
    speeds.save(path)
    again = Speeds.load(path)
    assert again.per_second(LONG, AWQ) == pytest.approx(260.0)
    assert not again.failures
    assert serving.complete(again, BF16, serving.measures(TINY))
    assert not serving.complete(again, AWQ, serving.measures(TINY))
    text = report(speeds)
    assert f"| {ONE} | 100.0 (1.00x) | 260.0 (2.60x) |" in text
    assert f"| {ONE} | {AWQ} | {BF16} | 2.6x | 2.60x |" in text
    assert f"- {AWQ}: RuntimeError: out of memory" in text


def test_time_runs_out() -> None:
    ticks: Iterator[int] = iter([0, 1, 2, *range(50, 100)])  # begin, warm-up, one round
    speeds, engines = Speeds("here"), {BF16: FakeEngine(100.0)}
    asked(speeds, engines, Budget.begin(10, lambda: float(next(ticks))))
    assert speeds.rates[ONE][BF16]
    assert not speeds.rates[LONG][BF16]
    assert f"- {LONG}: {BF16}: time ran out" in report(speeds)


def test_engines_start_together_and_failures_are_reasons() -> None:
    specs = {name: EngineSpec(name) for name in ("good", "bad")}

    def make(spec: EngineSpec, log: Path, seconds: float) -> serving.GpuEngine:
        if spec.model == "bad":
            raise EngineError("it stopped:\n  ValueError: no such kernel\n  goodbye")
        return FakeEngine(1.0)

    speeds = Speeds("here")
    assert list(serving.start(list(specs), specs, 5, speeds, make)) == ["good"]
    assert speeds.failures == {"bad": "ValueError: no such kernel"}


def test_an_engine_that_does_not_start_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_worker.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(Engine, "WORKER", "slow_worker")
    start = time.monotonic()
    with pytest.raises(EngineError, match="the engine stopped"):
        Engine(EngineSpec("model"), tmp_path / "log", start_seconds=0.2)
    assert time.monotonic() - start < 30


def test_groups_run_some_at_a_time() -> None:
    names = [name for group in GROUPS for name in group]
    assert list(serving.batches(names, 5)) == [list(group) for group in GROUPS]
    assert list(serving.batches(names[:3], 2)) == [names[:2], names[2:3]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8])
def test_codes_are_filled_at_random(dtype: torch.dtype) -> None:
    codes = torch.zeros(64, 64, dtype=dtype)
    serving_worker.fill(codes)
    assert len(codes.unique()) > 100
    if dtype == torch.int32:
        assert codes.view(torch.float8_e4m3fn).float().isfinite().all()
        assert bool((codes < 0).any())
    floats = torch.zeros(4)
    serving_worker.fill(floats)
    assert not floats.any()
