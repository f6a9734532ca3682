"""What was measured, in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_quantkit.evaluate.intervals import Interval
from vllm_quantkit.evaluate.quality import Perplexity, Quality
from vllm_quantkit.evaluate.tasks import TaskScore
from vllm_quantkit.long_generation.explain import explain
from vllm_quantkit.reporting.evaluation import Evaluation
from vllm_quantkit.terminal import Table, Terminal

WORST = 10
"""Groups of layers that are shown; the report has all."""


def show(evaluation: Evaluation, terminal: Terminal) -> None:
    """Tables of everything measured, then what a reader should know; JSON where that is wanted."""
    for measured in (evaluation.quality, evaluation.perplexity):
        if measured is not None:
            terminal.table(_quality_table(measured))
            terminal.line(_about(measured))
    for table in _tables(evaluation):
        terminal.line()
        terminal.table(table)
    if evaluation.long_generation is not None:
        terminal.line()
        for sentence in explain(evaluation.long_generation):
            terminal.line(sentence)
    for warning in _warnings(evaluation):
        terminal.warn(warning)
    terminal.result(evaluation)


def _quality_table(measured: Perplexity) -> Table:
    rows = [("perplexity", *_cells(measured.perplexity, "{:.3f}"))]
    if isinstance(measured, Quality):
        rows = [
            ("perplexity, 16 bits", *_cells(measured.base_perplexity, "{:.3f}")),
            *rows,
            ("increase", *_cells(measured.increase, "{:+.2%}")),
            ("KL divergence, nats per token", *_cells(measured.divergence, "{:.4g}")),
            ("its 99th percentile", f"{measured.divergence_tail:.4g}", "", ""),
            ("same most likely token", *_cells(measured.top1_agreement, "{:.1%}")),
        ]
    return Table("", ("", "measured", "95 % from", "to"), tuple(rows))


def _about(measured: Perplexity) -> str:
    return (
        f"{measured.tokens:,} tokens of {measured.source}, {measured.windows} windows of at most "
        f"{measured.length:,}; {measured.backend}"
    )


def _tables(evaluation: Evaluation) -> Iterator[Table]:
    layers = [layer for layer in evaluation.by_layer if not layer.is_block]
    blocks = [layer for layer in evaluation.by_layer if layer.is_block]
    for name, found in (("layers", layers), ("blocks", blocks)):
        if found:
            rows = [(x.group, f"{x.bits:.3g}", f"{x.kl:.4g}") for x in found[:WORST]]
            title = f"The {name} that cost most, of {len(found)}: {found[0].method}"
            yield Table(title, (name, "bits", "KL, nats per token"), tuple(rows))
    if evaluation.tasks:
        columns = ("task", "metric", "16 bits", "model", "drop", "95 % from", "to")
        yield Table("Tasks, by lm-eval", columns, tuple(map(_task_row, evaluation.tasks)))


def _task_row(score: TaskScore) -> tuple[str, ...]:
    base = "" if score.base is None else f"{score.base.value:.4g}"
    drop = ("", "", "") if score.drop is None else _cells(score.drop, "{:+.4g}")
    return (score.task, score.metric, base, f"{score.score.value:.4g}", *drop)


def _warnings(evaluation: Evaluation) -> Iterator[str]:
    yield from evaluation.warnings
    for measured in (evaluation.quality, evaluation.perplexity):
        yield from () if measured is None else measured.warnings
    if evaluation.long_generation is not None:
        yield from evaluation.long_generation.warnings


def _cells(figure: Interval, form: str) -> tuple[str, str, str]:
    value, low, high = map(form.format, (figure.value, figure.low, figure.high))
    return value, low, high
