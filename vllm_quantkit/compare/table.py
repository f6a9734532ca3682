"""The table as people read it, and as programs do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_quantkit.bench.results import Entry
from vllm_quantkit.compare.result import Comparison, RowResult, Step
from vllm_quantkit.evaluate.intervals import Interval
from vllm_quantkit.terminal import Table

MIB = 1 << 20
FAILED = "failed"

Column = tuple[str, list[str]]
"""A heading, and a cell for each row."""


def readable(comparison: Comparison) -> Table:
    """A row for each way to serve; columns in which nobody has a figure are left out."""
    columns = [("", [row.title for row in comparison.rows])]
    columns += [column for column in _columns(comparison) if any(column[1])]
    headings = tuple(heading for heading, _ in columns)
    rows = zip(*(cells for _, cells in columns), strict=True)
    return Table("", headings, tuple(rows))


def for_programs(comparison: Comparison) -> Table:
    """Plain numbers in the units of `Comparison`, intervals in columns of their own."""
    lines = [dict(_fields(comparison, row)) for row in comparison.rows]
    headings = tuple(dict.fromkeys(name for line in lines for name in line))
    rows = (tuple(line.get(name, "") for name in headings) for line in lines)
    return Table("", headings, tuple(rows))


@dataclass(frozen=True)
class _Cells:
    """Of one row, as people read them."""

    row: RowResult

    def bits(self) -> str:
        return str(self.row.bits) if self.row.bits else self._missing("checkpoint", "footprint")

    def weights(self) -> str:
        if self.row.weight_bytes is not None:
            return f"{self.row.weight_bytes / MIB:,.1f}"
        predicted = self.row.weight_bytes_predicted
        return "" if predicted is None else f"≈{predicted / MIB:,.1f}"

    def share(self) -> str:
        return "" if self.row.weight_share is None else f"{self.row.weight_share:.0%}"

    def cache(self) -> str:
        found = self.row.kv_bytes_per_token
        return "" if found is None else f"{found:,}"

    def speed(self, entry: Entry | None) -> str:
        """Times the 16-bit model, or that model's tokens per second."""
        if entry is None:
            return self._missing("speed")
        noisy = "~" if entry.sample.noisy else ""
        if entry.ratio is None:
            return f"{noisy}{_three(entry.sample.median)} tokens/s"
        ratio = entry.ratio
        doubt = "?" if ratio.verdict == "undecided" else ""
        return f"{noisy}{ratio.median:.2f}x{doubt} [{ratio.low:.2f}, {ratio.high:.2f}]"

    def perplexity(self) -> str:
        found = self.row.perplexity
        return self._missing("quality") if found is None else f"{found.value:.3f}"

    def increase(self) -> str:
        found = self.row.quality
        return "" if found is None else _interval(found.increase, 100, "+.2f", " %")

    def divergence(self) -> str:
        found = self.row.quality
        return "" if found is None else _interval(found.divergence, 1000, ".3g")

    def agreement(self) -> str:
        found = self.row.quality
        return "" if found is None else _interval(found.top1_agreement, 100, ".1f", " %")

    def task(self, task: str, metric: str) -> str:
        found = self.row.score(task, metric)
        if found is None:
            return self._missing("tasks")
        if found.drop is None:
            return f"{found.score.value:.4g}"
        return f"{found.score.value:.4g}, drop {_interval(found.drop, 1, '.3g')}"

    def seconds(self) -> str:
        found = self.row.quantise_seconds
        return "" if found is None else f"{found:,.0f}"

    def _missing(self, *steps: Step) -> str:
        return FAILED if any(self.row.failed(step) for step in steps) else ""


def _columns(comparison: Comparison) -> Iterator[Column]:
    cells = [_Cells(row) for row in comparison.rows]
    yield "bits W/A/KV", [c.bits() for c in cells]
    yield "weights, MiB", [c.weights() for c in cells]
    yield "of 16-bit", [c.share() for c in cells]
    yield "KV, bytes a token", [c.cache() for c in cells]
    for batch in comparison.batches:
        yield f"decode, batch of {batch}", [c.speed(c.row.decode.get(batch)) for c in cells]
    for tokens in comparison.prompts:
        yield f"prefill, {tokens} tokens", [c.speed(c.row.prefill.get(tokens)) for c in cells]
    yield "perplexity", [c.perplexity() for c in cells]
    yield "increase", [c.increase() for c in cells]
    yield "KL, millinats", [c.divergence() for c in cells]
    yield "same top token", [c.agreement() for c in cells]
    for task, metric in comparison.tasks:
        yield f"{task}, {_metric(metric)}", [c.task(task, metric) for c in cells]
    yield "quantised in, s", [c.seconds() for c in cells]


def _fields(comparison: Comparison, row: RowResult) -> Iterator[tuple[str, str]]:
    """Every column of the CSV file, for one row."""
    yield "row", row.name
    yield "title", row.title
    for part in ("weights", "activations", "kv"):
        widths = () if row.bits is None else getattr(row.bits, part)
        yield f"{part}_bits", " ".join(map(str, widths))
    for name in ("weight_bytes", "weight_bytes_predicted", "weight_share", "kv_bytes_per_token"):
        yield name, _plain(getattr(row, name))
    for batch in comparison.batches:
        yield from _speed_fields(f"decode_{batch}", row.decode.get(batch))
    for tokens in comparison.prompts:
        yield from _speed_fields(f"prefill_{tokens}", row.prefill.get(tokens))
    yield from _interval_fields("perplexity", row.perplexity)
    for name in ("increase", "divergence", "top1_agreement"):
        yield from _interval_fields(name, getattr(row.quality, name, None))
    for task, metric in comparison.tasks:
        found = row.score(task, metric)
        name = f"{task}_{_metric(metric)}"
        yield from _interval_fields(name, None if found is None else found.score)
        yield from _interval_fields(f"{name}_drop", None if found is None else found.drop)
    yield "quantise_seconds", _plain(row.quantise_seconds)
    yield "failures", " ".join(f"{failure.step}: {failure.reason}" for failure in row.failures)


def _speed_fields(name: str, entry: Entry | None) -> Iterator[tuple[str, str]]:
    ratio = None if entry is None else entry.ratio
    yield f"{name}_tokens_per_s", _plain(None if entry is None else entry.sample.median)
    yield f"{name}_speed_up", _plain(None if ratio is None else ratio.median)
    yield f"{name}_speed_up_low", _plain(None if ratio is None else ratio.low)
    yield f"{name}_speed_up_high", _plain(None if ratio is None else ratio.high)


def _interval_fields(name: str, found: Interval | None) -> Iterator[tuple[str, str]]:
    yield name, _plain(None if found is None else found.value)
    yield f"{name}_low", _plain(None if found is None else found.low)
    yield f"{name}_high", _plain(None if found is None else found.high)


def _plain(value: float | None) -> str:
    """As Python reads it again, bit for bit."""
    return "" if value is None else repr(value)


def _interval(found: Interval, scale: float, form: str, unit: str = "") -> str:
    value, low, high = (format(scale * v, form) for v in (found.value, found.low, found.high))
    return f"{value}{unit} [{low}, {high}]"


def _three(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _metric(name: str) -> str:
    """Without lm-eval's filter where that is none."""
    return name.removesuffix(",none")
