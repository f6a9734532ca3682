"""An evaluation as a report: what a reader must know first comes first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial

from vllm_quantkit.evaluate.quality import Perplexity, Quality
from vllm_quantkit.evaluate.sensitivity import LayerSensitivity
from vllm_quantkit.evaluate.tasks import TaskScore
from vllm_quantkit.reporting.drawing import HOW_TO_DRAW, can_draw
from vllm_quantkit.reporting.evaluation import Evaluation, Served
from vllm_quantkit.reporting.long_section import long_section
from vllm_quantkit.reporting.pictures import distribution_picture, layers_picture
from vllm_quantkit.reporting.sections import Document, Section, cells, drawn, in_one_cell
from vllm_quantkit.terminal import Table


def document(evaluation: Evaluation) -> Document:
    """Everything that was measured, and with what."""
    found = evaluation.long_generation
    sections = [
        *_warnings(evaluation.warnings),
        *_perplexity(evaluation.perplexity),
        *_quality(evaluation),
        *_layers(evaluation.by_layer),
        *_tasks(evaluation.tasks),
        *map(long_section, () if found is None else (found,)),
        _measured(evaluation),
    ]
    return Document(f"What {evaluation.model.model} costs", tuple(sections))


def _warnings(warnings: tuple[str, ...]) -> Iterator[Section]:
    if warnings:
        yield Section("Before you trust this", warnings)


def _perplexity(found: Perplexity | None) -> Iterator[Section]:
    if found is not None:
        line = (
            f"Over {found.tokens:,} tokens of {found.source}, in {found.windows} windows of at "
            f"most {found.length:,}, perplexity is {in_one_cell(found.perplexity, '{:.3f}')}. "
            f"There was no 16-bit model to compare with, so what quantising cost is not known."
        )
        yield Section("Perplexity on held-out text", (line, *found.warnings))


def _quality(evaluation: Evaluation) -> Iterator[Section]:
    quality = evaluation.quality
    if quality is None:
        return
    rows = (
        ("perplexity, 16 bits", *cells(quality.base_perplexity, "{:.3f}")),
        ("perplexity", *cells(quality.perplexity, "{:.3f}")),
        ("increase", *cells(quality.increase, "{:+.2%}")),
        ("KL divergence, nats per token", *cells(quality.divergence, "{:.4g}")),
        ("its 99th percentile", f"{quality.divergence_tail:.4g}", "", ""),
        ("same most likely token", *cells(quality.top1_agreement, "{:.1%}")),
    )
    found = evaluation.distribution
    yield Section(
        "Quality on held-out text",
        (_quality_line(quality), *quality.warnings),
        (Table("", ("", "measured", "95 % from", "to"), rows),),
        drawn(partial(distribution_picture, found)) if found else (),
    )


def _quality_line(quality: Quality) -> str:
    return (
        f"Over {quality.tokens:,} tokens of {quality.source}, in {quality.windows} windows of at "
        f"most {quality.length:,}, perplexity goes from {quality.base_perplexity.value:.3f} to "
        f"{quality.perplexity.value:.3f} ({quality.increase.value:+.2%}), and "
        f"{quality.top1_agreement.value:.1%} of the most likely tokens stay the same. Intervals "
        f"are over windows of text, not over models or tasks."
    )


def _layers(found: Sequence[LayerSensitivity]) -> Iterator[Section]:
    layers = sorted(found, key=lambda layer: layer.kl, reverse=True)
    if not layers:
        return
    methods = ", ".join(dict.fromkeys(layer.method for layer in layers))
    groups = [layer for layer in layers if not layer.is_block]
    blocks = [layer for layer in layers if layer.is_block]
    tables = (_layer_table("All groups of layers", groups), _layer_table("All blocks", blocks))
    yield Section(
        "Layer by layer",
        (f"How it was found: {methods}. Give the layers at the top more bits first.",),
        tuple(table for table in tables if table.rows),
        drawn(partial(layers_picture, layers)),
    )


def _layer_table(title: str, layers: Sequence[LayerSensitivity]) -> Table:
    rows = tuple((x.group, f"{x.bits:.3g}", f"{x.kl:.4g}") for x in layers)
    return Table(title, ("layers", "bits", "KL divergence, nats per token"), rows)


def _tasks(scores: tuple[TaskScore, ...]) -> Iterator[Section]:
    if not scores:
        return
    rows = tuple(
        (
            f"{score.task}, {score.metric}",
            in_one_cell(score.score, "{:.4g}"),
            "" if score.base is None else in_one_cell(score.base, "{:.4g}"),
            "" if score.drop is None else in_one_cell(score.drop, "{:+.4g}"),
        )
        for score in scores
    )
    columns = ("task, metric", "model", "16 bits", "worse by")
    files = dict.fromkeys(path for x in scores for path in (x.results, x.base_results) if path)
    lines = (
        "Brackets hold 95 % intervals over the tasks' questions: a drop whose interval holds 0 was "
        "not shown.",
        f"lm-eval's own results: {', '.join(files)}.",
    )
    yield Section("Tasks", lines, (Table("", columns, rows),))


def _measured(evaluation: Evaluation) -> Section:
    rows = [("model", _served(evaluation.model))]
    if evaluation.base is not None:
        rows.append(("16-bit base", _served(evaluation.base)))
    rows += [("computed by", evaluation.backend), ("machine", evaluation.machine)]
    if evaluation.source:
        rows += [("text", evaluation.source), ("its fingerprint", evaluation.fingerprint)]
    rows += sorted(evaluation.versions.items())
    lines = () if can_draw() else (HOW_TO_DRAW,)
    return Section("What was measured, and with what", lines, (Table("", ("", ""), tuple(rows)),))


def _served(served: Served) -> str:
    flags = [f"--quantization {served.quantization}"] if served.quantization else []
    flags.append(f"--max-model-len {served.max_model_len}")
    flags += [f"{name}={json.dumps(value)}" for name, value in sorted(served.options.items())]
    return " ".join((served.model, *flags))
