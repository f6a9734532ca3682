"""Limits that make a command fail.

A gate compares the figure as measured with the limit. Where the limit lies inside the figure's
interval, another choice of text might have decided otherwise, and a warning says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.evaluate.intervals import Interval
from vllm_quantkit.evaluate.quality import Quality
from vllm_quantkit.evaluate.tasks import TaskScore
from vllm_quantkit.spec import Frozen


class Gates(Frozen):
    """Limits; None for none.

    Attributes:
        max_kl: of the mean KL divergence, nats for each token.
        max_ppl_increase: of the relative increase of perplexity; 0.02 is 2 %.
        min_top1: of the share of tokens with the same first choice.
        max_task_drop: of every task's metrics, in their own unit: 0.01 of an accuracy is a point.
    """

    max_kl: float | None = None
    max_ppl_increase: float | None = None
    min_top1: float | None = None
    max_task_drop: float | None = None

    @property
    def need_base(self) -> bool:
        """True where a limit compares with the 16-bit model."""
        return any(limit is not None for limit in self.model_dump().values())


class Verdict(Frozen):
    """A figure beside its limit.

    Attributes:
        sentence: figure, interval and limit in words.
        failed: True beyond the limit.
        close: True where the limit lies inside the interval.
    """

    sentence: str
    failed: bool
    close: bool


def read_fraction(text: str) -> float:
    """0.02 of `0.02` or of `2%`.

    Raises:
        ConfigError: it is neither.
    """
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        return float(number) / (100 if percent else 1)
    except ValueError as error:
        raise ConfigError(f"{text!r} is no fraction: give one such as 0.02, or 2%.") from error


def judge(gates: Gates, quality: Quality | None, tasks: Sequence[TaskScore]) -> list[Verdict]:
    """A verdict for each limit that was given.

    Raises:
        ConfigError: a limit of what was not measured.
    """
    return [*_quality_verdicts(gates, quality), *_task_verdicts(gates, tasks)]


def _quality_verdicts(gates: Gates, quality: Quality | None) -> Iterator[Verdict]:
    wanted = (gates.max_kl, gates.max_ppl_increase, gates.min_top1)
    if all(limit is None for limit in wanted):
        return
    if quality is None:
        raise ConfigError(
            "a limit of what quantising costs was given, but there is no 16-bit model to compare "
            "with: pass --against BASE."
        )
    if gates.max_kl is not None:
        yield _most("KL divergence", quality.divergence, gates.max_kl, "{:.4g}")
    if gates.max_ppl_increase is not None:
        yield _most("perplexity increase", quality.increase, gates.max_ppl_increase, "{:.2%}")
    if gates.min_top1 is not None:
        yield _least("top-1 agreement", quality.top1_agreement, gates.min_top1, "{:.2%}")


def _task_verdicts(gates: Gates, tasks: Sequence[TaskScore]) -> Iterator[Verdict]:
    if gates.max_task_drop is None:
        return
    drops = [(score, score.drop) for score in tasks if score.drop is not None]
    if not drops:
        raise ConfigError(
            "--max-task-drop was given, but no task was compared with a 16-bit model: pass --tasks "
            "and --against BASE."
        )
    for score, drop in drops:
        yield _most(f"drop of {score.task} ({score.metric})", drop, gates.max_task_drop, "{:.4g}")


def _most(name: str, figure: Interval, limit: float, form: str) -> Verdict:
    return _verdict(name, figure, limit, form, "at most", failed=not figure.value <= limit)


def _least(name: str, figure: Interval, limit: float, form: str) -> Verdict:
    return _verdict(name, figure, limit, form, "at least", failed=not figure.value >= limit)


def _verdict(
    name: str, figure: Interval, limit: float, form: str, side: str, *, failed: bool
) -> Verdict:
    value, low, high, bound = map(form.format, (figure.value, figure.low, figure.high, limit))
    return Verdict(
        sentence=f"{name} is {value} (95 %: {low} to {high}); {side} {bound} is allowed",
        failed=failed,
        close=figure.low <= limit <= figure.high,
    )
