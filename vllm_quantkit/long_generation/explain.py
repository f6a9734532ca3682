"""What long generation means, in sentences for the one who must decide."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_quantkit.evaluate.intervals import Interval
from vllm_quantkit.long_generation.result import Decoding, Divergence, LongGeneration, Written

MANY = 4
"""More than every fourth text in a loop decides what late text is like."""

CLOSE_CALL = 0.6
"""Probability below which the most likely token was not the only likely one."""


def explain(result: LongGeneration) -> tuple[str, ...]:
    """Every decoding's divergence, compounding, repetition and length, a sentence each."""
    return tuple(line for decoding in result.decodings for line in _about(decoding, result))


def _about(decoding: Decoding, result: LongGeneration) -> Iterator[str]:
    name = decoding.name.capitalize()
    yield f"{name}: {_divergence(decoding.divergence, 'the quantised model', 'the base')}"
    if decoding.noise is not None:
        yield f"{name}: {_noise(decoding.noise, decoding.divergence)}"
    if decoding.parting_probability is not None:
        yield (
            f"{name}: where they part, the base itself gave its own token a probability of "
            f"{decoding.parting_probability:.0%} (median): {_closeness(decoding)}."
        )
    yield from _compounding(decoding)
    yield f"{name}: {_repetition(decoding)}"
    if result.ends:
        yield f"{name}: {_lengths(decoding.base, decoding.model)}"


def _divergence(found: Divergence, who: str, whom: str) -> str:
    count, parted = len(found.positions), sum(at is not None for at in found.positions)
    longest = max(found.lengths)
    if not parted:
        return f"{who} writes what {whom} writes, token for token, in all {count} texts."
    half = (
        f"half of the texts have parted at token {found.median:,}"
        if found.median is not None
        else "more than half of the texts never part"
    )
    return (
        f"{who} parts from {whom} in {parted} of {count} texts of up to {longest:,} tokens; {half}."
    )


def _noise(noise: Divergence, divergence: Divergence) -> str:
    """How much of the divergence batches of another size make by themselves."""
    parted = sum(at is not None for at in noise.positions)
    said = f"the base parts from itself in {parted} of {len(noise.positions)} texts"
    if not parted:
        return f"{said} when batches have another size, so none of that is rounding in batches."
    soon = _median(noise) <= _median(divergence)
    meaning = (
        "as soon as the quantised model, whose divergence is then no more than rounding"
        if soon
        else "later than the quantised model, whose divergence before that is its own"
    )
    return f"{said} when batches have another size, {meaning}."


def _median(found: Divergence) -> float:
    return float("inf") if found.median is None else float(found.median)


def _closeness(decoding: Decoding) -> str:
    probability = decoding.parting_probability or 0.0
    return (
        "a close call"
        if probability < CLOSE_CALL
        else "it was sure, and the quantised model was not"
    )


def _compounding(decoding: Decoding) -> Iterator[str]:
    found = decoding.compounding
    if found is None:
        return
    name = decoding.name.capitalize()
    yield (
        f"{name}: KL divergence along the base's text is {found.early:.3g} nats in its first "
        f"quarter and {found.late:.3g} in its last, {_times(found.ratio)}: "
        f"{compounding_verdict(found.ratio)}"
    )
    looping, count = len(decoding.base.loops), len(decoding.base.lengths)
    if looping > count // MANY:
        yield (
            f"{name}: {looping} of {count} of the base's own texts end in a loop, so that late KL "
            f"divergence is about loops more than about text that anyone asks for: give prompts "
            f"that it answers without one."
        )


def compounding_verdict(ratio: Interval) -> str:
    """What late / early KL, with its interval, says."""
    if ratio.low > 1:
        return "errors compound, so scores of short answers flatter this model."
    if ratio.high < 1:
        return "the models come closer along the text, so errors do not compound."
    if ratio.low <= 1 <= ratio.high:
        return "these prompts show no sign that errors compound."
    return "too little divergence to tell whether errors compound."


def _times(ratio: Interval) -> str:
    return f"{ratio.value:.2f} times as much (95 %: {ratio.low:.2f} to {ratio.high:.2f})"


def _repetition(decoding: Decoding) -> str:
    model, base = decoding.model, decoding.base
    said = (
        f"{model.repetition.value:.1%} of the quantised model's 4-grams repeat earlier ones, "
        f"{base.repetition.value:.1%} of the base's; "
    )
    if not model.loops:
        return said + "none of its texts ends in a loop" + _base_loops(base, bool(model.loops))
    first = min(loop.position for loop in model.loops)
    return (
        f"{said}{len(model.loops)} of its {len(model.lengths)} texts end in a loop, the first from "
        f"token {first:,} on{_base_loops(base, bool(model.loops))}"
    )


def _base_loops(base: Written, other: bool) -> str:
    count = len(base.loops)
    if not count:
        return ", nor do the base's." if not other else "; none of the base's does."
    return f"; {count} of the base's {'do' if count > 1 else 'does'}."


def _lengths(base: Written, model: Written) -> str:
    count = len(model.lengths)
    return (
        f"the quantised model ends {model.ended} of {count} texts by itself (median "
        f"{model.median_length:,.0f} tokens), the base {base.ended} (median "
        f"{base.median_length:,.0f}); the others were cut off."
    )
