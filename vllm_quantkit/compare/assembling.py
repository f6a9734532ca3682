"""From what was found of each row to the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vllm_quantkit.compare.result import Comparison, RowResult
from vllm_quantkit.compare.running import Outcome
from vllm_quantkit.compare.serving import serve_command


def assemble(
    outcomes: Sequence[Outcome],
    *,
    model: str,
    machine: str,
    notes: Sequence[str] = (),
    quick: bool = False,
) -> Comparison:
    """The table of these rows, of which the first is the 16-bit model.

    Args:
        outcomes: row by row.
        model: folder or hub name.
        machine: in words, with versions.
        notes: what the figures were measured with.
        quick: True for the reduced form.
    """
    return Comparison(
        model=model,
        quick=quick,
        machine=machine,
        rows=tuple(_row(outcome, outcomes[0]) for outcome in outcomes),
        notes=(*_text(outcomes), *notes),
        doubts=tuple(dict.fromkeys(_doubts(outcomes))),
    )


def _row(outcome: Outcome, base: Outcome) -> RowResult:
    served, facts, timing = outcome.served, outcome.facts, outcome.timing
    return RowResult(
        name=outcome.row.name,
        title=outcome.row.title,
        serve="" if served is None else serve_command(served.spec),
        bits=None if facts is None else facts.bits,
        weight_bytes=None if timing is None else timing.weight_bytes,
        weight_bytes_predicted=None if facts is None else facts.weight_bytes,
        weight_share=_share(outcome, base),
        kv_bytes_per_token=None if facts is None else facts.kv_bytes_per_token,
        cache_tokens=None if timing is None else timing.cache_tokens,
        decode={} if timing is None else timing.of("decode"),
        prefill={} if timing is None else timing.of("prefill"),
        perplexity=None if outcome.perplexity is None else outcome.perplexity.perplexity,
        quality=outcome.quality,
        tasks=outcome.tasks,
        quantise_seconds=None if served is None else served.seconds,
        failures=tuple(outcome.failures),
    )


def _share(outcome: Outcome, base: Outcome) -> float | None:
    """Of the 16-bit model's weights: measured where both were, else predicted."""
    if outcome.timing is not None and base.timing is not None:
        return outcome.timing.weight_bytes / base.timing.weight_bytes
    if outcome.facts is None or outcome.facts.weight_bytes is None:
        return None
    return outcome.facts.weight_bytes / outcome.facts.weight_bytes_16bit


def _text(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What perplexity was measured on."""
    measured = [o.perplexity for o in outcomes if o.perplexity is not None]
    if measured:
        text = measured[0]
        yield (
            f"Held-out text: {text.source}, {text.windows} windows of up to {text.length} tokens, "
            f"{text.tokens:,} of them predicted, by {text.backend}."
        )


def _doubts(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A sentence each; one that all rows share is about the text or the machine, and said once."""
    measured = [outcome for outcome in outcomes if outcome.quality is not None]
    said: dict[str, list[str]] = {}
    for outcome in measured:
        for warning in () if outcome.quality is None else outcome.quality.warnings:
            said.setdefault(warning, []).append(outcome.row.title)
    for warning, titles in said.items():
        yield warning if len(titles) == len(measured) else f"{', '.join(titles)}: {warning}"
    for outcome in outcomes:
        yield from () if outcome.timing is None else outcome.timing.doubts
