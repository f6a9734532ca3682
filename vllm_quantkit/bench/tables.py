"""A benchmark's result as tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_quantkit.bench.quantities import QUANTITIES, Key, shown, title
from vllm_quantkit.bench.results import BenchResult, Entry, Row
from vllm_quantkit.bench.rounds import count_rounds
from vllm_quantkit.bench.samples import NOISY
from vllm_quantkit.terminal import Table

MIB = 1 << 20

TOLD = 3
"""Sentences about differences that noise hides; the result as JSON has all."""

LEGEND = (
    "Medians of {rounds} in which all take turns; in brackets how many times as fast as {base}, "
    "by round. ?: noise may explain the difference. ~: rounds spread by more than "
    f"{NOISY:.0%}."
)

CSV_COLUMNS = (
    "scheme", "quantity", "at", "unit", "median", "low", "high", "noisy",
    "ratio", "ratio_low", "ratio_high", "verdict",
)  # fmt: skip


def result_table(result: BenchResult) -> Table:
    """A row for each quantity, a column for each scheme that was measured."""
    rows = result.measured
    lines = [(title(key), *(_cell(row.entry(key), key) for row in rows)) for key in result.keys]
    lines += [line for line in _memory_lines(rows) if any(line[1:])]
    return Table("", ("", *(row.label for row in rows)), tuple(lines))


def long_table(result: BenchResult) -> Table:
    """A row for each quantity of each scheme, for programs; in the units of the samples."""
    lines = [_long_line(row.label, entry) for row in result.measured for entry in row.entries]
    return Table("", CSV_COLUMNS, tuple(lines))


def sentences(result: BenchResult) -> Iterator[str]:
    """What stands below the table."""
    if result.base is not None:
        yield LEGEND.format(rounds=count_rounds(result.rounds), base=result.base)
    for row in result.rows:
        if row.failure:
            yield f"{row.label} failed: {row.failure}"
    yield result.machine


def doubts(result: BenchResult) -> Iterator[str]:
    """What the reader is to be warned of."""
    yield from result.noise.warnings()
    yield from result.undecided[:TOLD]
    more = len(result.undecided) - TOLD
    if more > 0:
        yield f"{more} more differences cannot be told from noise, marked in the table."


def _memory_lines(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    yield "perplexity of the check", *(_number(row.perplexity, "{:.3f}") for row in rows)
    yield "weights, MiB", *(_number(_mib(row.weight_bytes), "{:,.1f}") for row in rows)
    yield "KV cache, tokens", *(_number(row.cache_tokens, "{:,}") for row in rows)
    yield "peak memory, MiB", *(_number(_mib(row.peak_bytes), "{:,.0f}") for row in rows)


def _mib(value: int | None) -> float | None:
    return None if value is None else value / MIB


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _cell(entry: Entry | None, key: Key) -> str:
    if entry is None:
        return ""
    text = ("~" if entry.sample.noisy else "") + shown(key, entry.sample.median)
    if entry.ratio is None:
        return text
    doubt = "?" if entry.ratio.verdict == "undecided" else ""
    return f"{text} ({entry.ratio.median:.2f}x{doubt})"


def _long_line(label: str, entry: Entry) -> tuple[str, ...]:
    sample, ratio = entry.sample, entry.ratio
    values = (sample.median, sample.low, sample.high)
    compared: tuple[str, ...] = ("",) * 4
    if ratio is not None:
        interval = (ratio.median, ratio.low, ratio.high)
        compared = (*(f"{value:.4f}" for value in interval), ratio.verdict)
    return (
        label,
        entry.quantity,
        f"{entry.at:g}",
        QUANTITIES[entry.quantity].unit,
        *(f"{value:.6g}" for value in values),
        str(sample.noisy).lower(),
        *compared,
    )
