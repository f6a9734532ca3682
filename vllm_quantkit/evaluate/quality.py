"""Perplexity, and how far a quantised model is from its 16-bit original, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.evaluate.base_scores import (
    BaseScores,
    check_room,
    claimed,
    default_folder,
    fingerprint,
    vocabulary_size,
)
from vllm_quantkit.evaluate.intervals import Interval, mean_interval
from vllm_quantkit.evaluate.scorers import Backend, backend_version, open_scorer
from vllm_quantkit.evaluate.window_scores import Floats, WindowScores
from vllm_quantkit.evaluate.windows import Windows
from vllm_quantkit.spec import Frozen
from vllm_quantkit.terminal import Terminal

__all__ = [
    "BaseScores",
    "Interval",
    "Perplexity",
    "Quality",
    "Windows",
    "compare_windows",
    "measure_base",
    "measure_perplexity",
    "measure_quality",
    "score_windows",
    "summarise_windows",
]

TAIL = 0.99
"""Quantile of the divergence that is reported beside the mean."""

CONCLUSIVE_WINDOWS = 8
"""With fewer, an interval is over 1.2 times as wide as the same spread over many would make it."""

SILENT = Terminal(quiet=True)


class Perplexity(Frozen):
    """What a model says of windows of text.

    Attributes:
        tokens: predicted.
        perplexity: exp(mean negative log-likelihood of the next token).
        backend: what ran the model, with its version.
        source: of the text.
        windows: of text.
        length: tokens of the longest window.
        warnings: what keeps the figures from saying more, a sentence each.
    """

    tokens: int
    perplexity: Interval
    backend: str
    source: str
    windows: int
    length: int
    warnings: tuple[str, ...] = ()


class Quality(Perplexity):
    """A quantised model beside its 16-bit original, on the same tokens.

    Attributes:
        base_perplexity: the original's.
        increase: perplexity / base_perplexity - 1, paired token by token.
        divergence: mean over tokens of KL(base || model) = sum p (ln p - ln q), in nats.
        divergence_tail: its 99th percentile.
        top1_agreement: share of tokens for which both find the same one most likely.
    """

    base_perplexity: Interval
    increase: Interval
    divergence: Interval
    divergence_tail: float
    top1_agreement: Interval


def measure_base(
    spec: EngineSpec,
    windows: Windows,
    folder: Path | None = None,
    *,
    backend: Backend = "vllm",
    log: Path | None = None,
    terminal: Terminal = SILENT,
) -> BaseScores:
    """The 16-bit model's log-probabilities on disk; windows that are there already are kept.

    Args:
        spec: the 16-bit model.
        windows: the text.
        folder: where they are, or will be; None is one in the cache folder that belongs to this
            model, text and version.
        backend: what runs the model; the same must run those that are compared with it.
        log: where an engine writes.
        terminal: is told how far it is.

    Raises:
        CheckpointError: the disk has no room, or the folder holds other scores.
        QuantkitError: the model cannot be run.
    """
    version = backend_version(backend)
    record = fingerprint(spec, windows, version)
    scores = BaseScores(folder or default_folder(record), windows, version)
    with claimed(scores.folder, record):
        missing = scores.missing()
        check_room(scores, vocabulary_size(spec.model))
        if missing:
            with (
                terminal.phase("16-bit model", len(missing)) as tick,
                open_scorer(backend, spec, windows.length, log) as scorer,
            ):
                for index in missing:
                    scorer.score(windows.rows[index], keep=scores.path(index))
                    tick()
    return scores


def measure_quality(
    spec: EngineSpec,
    base: BaseScores,
    *,
    backend: Backend = "vllm",
    log: Path | None = None,
    terminal: Terminal = SILENT,
) -> Quality:
    """A model beside the 16-bit one, on the windows of `base`; see `score_windows`."""
    scores = score_windows(spec, base.windows, base, backend=backend, log=log, terminal=terminal)
    return compare_windows(scores, base.windows, base.backend)


def measure_perplexity(
    spec: EngineSpec,
    windows: Windows,
    *,
    backend: Backend = "vllm",
    log: Path | None = None,
    terminal: Terminal = SILENT,
) -> Perplexity:
    """A model's perplexity, where there is nothing to compare it with; see `score_windows`."""
    scores = score_windows(spec, windows, backend=backend, log=log, terminal=terminal)
    return summarise_windows(scores, windows, backend_version(backend))


def score_windows(
    spec: EngineSpec,
    windows: Windows,
    base: BaseScores | None = None,
    *,
    backend: Backend = "vllm",
    log: Path | None = None,
    terminal: Terminal = SILENT,
) -> list[WindowScores]:
    """Every token's figures, window by window.

    Args:
        spec: the model.
        windows: the text.
        base: of `measure_base` with the same windows and backend; None compares with nothing.
        backend: what runs the model.
        log: where an engine writes.
        terminal: is told how far it is.

    Raises:
        QuantkitError: the model cannot be run, or has another vocabulary.
    """
    scores = []
    with (
        terminal.phase("model", len(windows.rows)) as tick,
        open_scorer(backend, spec, windows.length, log) as scorer,
    ):
        for index, row in enumerate(windows.rows):
            scores.append(scorer.score(row, base=None if base is None else base.path(index)))
            tick()
    return scores


def summarise_windows(scores: Sequence[WindowScores], windows: Windows, backend: str) -> Perplexity:
    """What the windows' figures come to by themselves."""
    return Perplexity(
        tokens=windows.predicted,
        perplexity=_mean([window.losses for window in scores]).mapped(_exp),
        backend=backend,
        source=windows.source,
        windows=len(windows.rows),
        length=windows.length,
        warnings=(*windows.warnings, *_few(windows)),
    )


def compare_windows(scores: Sequence[WindowScores], windows: Windows, backend: str) -> Quality:
    """What the windows' figures, compared with a base, come to."""
    losses = [window.losses for window in scores]
    base = [_there(window.base_losses) for window in scores]
    divergences = [_there(window.divergences) for window in scores]
    change = _mean([after - before for after, before in zip(losses, base, strict=True)])
    every = np.sort(np.concatenate(divergences))
    quality = Quality(
        tokens=windows.predicted,
        perplexity=_mean(losses).mapped(_exp),
        base_perplexity=_mean(base).mapped(_exp),
        increase=change.mapped(_expm1),
        divergence=_mean(divergences).within(0, math.inf),
        divergence_tail=float(every[max(1, round(TAIL * len(every))) - 1]),
        top1_agreement=_mean([_there(window.agreements) for window in scores]).within(0, 1),
        backend=backend,
        source=windows.source,
        windows=len(windows.rows),
        length=windows.length,
    )
    warnings = (*windows.warnings, *_few(windows), *_undecided(quality.increase))
    return quality.model_copy(update={"warnings": warnings})


def _mean(windows: Sequence[Floats]) -> Interval:
    return mean_interval([float(w.sum()) for w in windows], [len(w) for w in windows])


def _there(values: Floats | None) -> Floats:
    assert values is not None, "the window was compared with a base"
    return values


def _few(windows: Windows) -> tuple[str, ...]:
    if len(windows.rows) >= CONCLUSIVE_WINDOWS:
        return ()
    return (
        f"{len(windows.rows)} windows are too few to conclude much, and the intervals wide and "
        f"rough: give --windows {CONCLUSIVE_WINDOWS} or more.",
    )


def _undecided(increase: Interval) -> tuple[str, ...]:
    if increase.low > 0 or increase.high < 0 or increase.low == increase.high:
        return ()
    return (
        "the two models' perplexities cannot be told apart on these windows: "
        f"{increase.value:+.2%}, between {increase.low:+.2%} and {increase.high:+.2%}; "
        "more windows would tell.",
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _expm1(value: float) -> float:
    return math.expm1(value) if value < 700 else math.inf
