"""The report's section on long generation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from vllm_quantkit.long_generation.explain import explain
from vllm_quantkit.long_generation.result import Decoding, Divergence, LongGeneration
from vllm_quantkit.reporting.pictures import along_picture, survival_picture
from vllm_quantkit.reporting.sections import Section, cells, drawn, in_one_cell
from vllm_quantkit.terminal import Table


def long_section(found: LongGeneration) -> Section:
    """What long continuations showed, in sentences, a table, and the curves."""
    shown = drawn(
        partial(survival_picture, found.decodings),
        partial(along_picture, found.decodings),
    )
    intro = (
        f"{found.prompts} prompts of {found.source}, continued by up to {found.tokens:,} tokens "
        f"with {found.backend}. Short answers hide errors that grow along a text; this is where "
        f"they would show."
    )
    tables = (_long_table(found), *_loop_tables(found), *map(_curve_table, found.decodings))
    return Section("Long generation", (intro, *explain(found), *found.warnings), tables, shown)


def _long_table(found: LongGeneration) -> Table:
    columns = ("", *(decoding.name for decoding in found.decodings))
    rows = (
        ("texts that part from the base's", *(_parted(d.divergence) for d in found.decodings)),
        (
            "share that never parts",
            *(in_one_cell(d.divergence.never, "{:.0%}") for d in found.decodings),
        ),
        ("the base from itself, other batches", *(_noise(d) for d in found.decodings)),
        ("median token of parting", *(_position(d.divergence.median) for d in found.decodings)),
        ("late / early KL divergence", *map(_ratio, found.decodings)),
        ("slope, nats per 1,000 tokens", *map(_slope, found.decodings)),
        ("repeated 4-grams, model", *(f"{d.model.repetition.value:.1%}" for d in found.decodings)),
        ("repeated 4-grams, base", *(f"{d.base.repetition.value:.1%}" for d in found.decodings)),
        ("texts that end in a loop, model", *(str(len(d.model.loops)) for d in found.decodings)),
        ("texts that end in a loop, base", *(str(len(d.base.loops)) for d in found.decodings)),
        ("median length, model", *(f"{d.model.median_length:,.0f}" for d in found.decodings)),
        ("median length, base", *(f"{d.base.median_length:,.0f}" for d in found.decodings)),
    )
    return Table("", columns, rows)


def _loop_tables(found: LongGeneration) -> Iterator[Table]:
    rows = tuple(
        (decoding.name, who, f"{loop.prompt + 1}", f"{loop.position:,}", f"{loop.period:,}")
        for decoding in found.decodings
        for who, written in (("model", decoding.model), ("base", decoding.base))
        for loop in written.loops
    )
    if rows:
        columns = ("text", "of", "prompt", "from token", "period, tokens")
        yield Table("Texts that end in a loop", columns, rows)


def _curve_table(decoding: Decoding) -> Table:
    rows = tuple(
        (f"{part.first:,} to {part.last:,}", *cells(part.divergence, "{:.4g}"), str(part.prompts))
        for part in decoding.curve
    )
    columns = ("tokens", "KL divergence, nats", "95 % from", "to", "prompts")
    return Table(f"KL divergence along the base's {decoding.name} text", columns, rows)


def _parted(found: Divergence) -> str:
    return f"{len(found.positions) - found.positions.count(None)} of {len(found.positions)}"


def _noise(decoding: Decoding) -> str:
    return "not measured" if decoding.noise is None else _parted(decoding.noise)


def _position(position: int | None) -> str:
    return "never" if position is None else f"{position:,}"


def _ratio(decoding: Decoding) -> str:
    found = decoding.compounding
    return "" if found is None else in_one_cell(found.ratio, "{:.2f}")


def _slope(decoding: Decoding) -> str:
    found = decoding.compounding
    return "" if found is None else in_one_cell(found.slope, "{:+.2g}")
