"""What stands below the table: how to read it, what it was measured with, what is missing."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_quantkit.bench.results import Entry
from vllm_quantkit.bench.samples import LEAST_CONFIDENCE, NOISY
from vllm_quantkit.compare.result import Comparison
from vllm_quantkit.compare.rows import BASE

QUICK = (
    "QUICK: a reduced form with few windows, samples and rounds. It shows that everything works; "
    "its figures are too rough to quote."
)

BITS = (
    "Bits of weights, activations and KV cache of the linear layers in blocks; weights are the "
    "whole model's as they lie in the engine's memory (≈: predicted from the files' headers)."
)

QUALITY = (
    "Perplexity of held-out text, its increase, KL(16-bit || row) in nats / 1000 and the share of "
    "tokens with the same most likely one, on the same tokens; in brackets 95 % intervals over "
    "windows."
)

TASKS = (
    "Tasks: scores of lm-eval, and what they are worse by than the 16-bit model's, with 95 % "
    "intervals that take both for independent."
)

SECONDS = "Quantised in: seconds of the quantiser on this machine, reading and writing included."


def notes_below(comparison: Comparison) -> Iterator[str]:
    """The sentences below a table, in the order in which they are read."""
    if comparison.quick:
        yield QUICK
    yield BITS
    yield from _speed(comparison)
    if any(row.quality for row in comparison.rows):
        yield QUALITY
    if comparison.tasks:
        yield TASKS
    if any(row.quantise_seconds is not None for row in comparison.rows):
        yield SECONDS
    yield from comparison.notes
    yield comparison.machine


def doubts_of(comparison: Comparison) -> Iterator[str]:
    """What is missing, and what the figures do not tell."""
    for failure in comparison.failures():
        yield f"failed: {failure}"
    yield from comparison.doubts
    rounds = {len(e.sample.rounds) for e in _compared(comparison) if _few(e)}
    if rounds:
        few = min(rounds)
        yield f"Rounds are too few to tell speeds from noise ({few}): give --rounds 5 or more."


def _speed(comparison: Comparison) -> Iterator[str]:
    rounds = {len(entry.sample.rounds) for entry in _compared(comparison)}
    if rounds:
        yield (
            f"Decode and prefill: tokens/s of the {BASE.title} model, and how many times as fast "
            f"others are: medians over rounds ({', '.join(map(str, sorted(rounds)))}) in which all "
            "take turns, in brackets the interval of the true median. ?: noise may explain the "
            f"difference. ~: rounds spread by more than {NOISY:.0%}."
        )


def _compared(comparison: Comparison) -> Iterator[Entry]:
    for row in comparison.rows:
        yield from (e for e in (*row.decode.values(), *row.prefill.values()) if e.ratio is not None)


def _few(entry: Entry) -> bool:
    return entry.ratio is not None and entry.ratio.confidence < LEAST_CONFIDENCE
