"""Limits compare with the figure as measured, and say where its interval leaves doubt."""

from __future__ import annotations

import math

import pytest

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.evaluate.gates import Gates, judge, read_fraction
from vllm_quantkit.evaluate.intervals import Interval, normal_interval
from vllm_quantkit.evaluate.quality import Quality
from vllm_quantkit.evaluate.tasks import TaskScore


def interval(value: float, reach: float) -> Interval:
    return Interval(value=value, low=value - reach, high=value + reach)


QUALITY = Quality(
    tokens=1000,
    perplexity=interval(10.2, 1),
    base_perplexity=interval(10.0, 1),
    increase=interval(0.02, 0.005),
    divergence=interval(0.03, 0.01),
    divergence_tail=0.2,
    top1_agreement=interval(0.9, 0.02),
    backend="test",
    source="text",
    windows=10,
    length=101,
)
TASK = TaskScore(
    task="mmlu",
    metric="acc,none",
    score=normal_interval(0.5, 0.01),
    base=normal_interval(0.53, 0.01),
    drop=normal_interval(0.03, math.hypot(0.01, 0.01)),
    results="r.json",
)


@pytest.mark.parametrize(
    ("gates", "failed", "close"),
    [
        ({"max_kl": 0.05}, False, False),
        ({"max_kl": 0.035}, False, True),
        ({"max_kl": 0.03}, False, True),
        ({"max_kl": 0.025}, True, True),
        ({"max_kl": 0.01}, True, False),
        ({"max_ppl_increase": 0.03}, False, False),
        ({"max_ppl_increase": 0.01}, True, False),
        ({"min_top1": 0.8}, False, False),
        ({"min_top1": 0.91}, True, True),
        ({"max_task_drop": 0.1}, False, False),
        ({"max_task_drop": 0.02}, True, True),
    ],
)
def test_a_limit_is_kept_or_not(gates: dict[str, float], failed: bool, close: bool) -> None:
    (verdict,) = judge(Gates(**gates), QUALITY, [TASK])
    assert (verdict.failed, verdict.close) == (failed, close)


def test_a_verdict_names_figure_interval_and_limit() -> None:
    (verdict,) = judge(Gates(max_ppl_increase=0.01), QUALITY, [])
    assert verdict.sentence == (
        "perplexity increase is 2.00% (95 %: 1.50% to 2.50%); at most 1.00% is allowed"
    )


def test_what_is_not_a_number_fails() -> None:
    broken = QUALITY.model_copy(update={"divergence": interval(math.nan, 0.0)})
    (verdict,) = judge(Gates(max_kl=1.0), broken, [])
    assert verdict.failed


def test_no_limits_judge_nothing() -> None:
    assert judge(Gates(), None, []) == []


def test_limits_of_what_was_not_measured_are_errors() -> None:
    with pytest.raises(ConfigError, match="pass --against BASE"):
        judge(Gates(max_kl=1.0), None, [])
    alone = TASK.model_copy(update={"drop": None})
    with pytest.raises(ConfigError, match="no task was compared"):
        judge(Gates(max_task_drop=1.0), QUALITY, [alone])


def test_fractions_may_be_per_cent() -> None:
    assert read_fraction("0.02") == 0.02
    assert read_fraction("2%") == read_fraction(" 2 %") == 0.02
    with pytest.raises(ConfigError, match="'two' is no fraction"):
        read_fraction("two")
