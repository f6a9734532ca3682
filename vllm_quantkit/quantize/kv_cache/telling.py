"""What a user is told of a calibration of the KV cache."""

from __future__ import annotations

import json
from pathlib import Path

from quantkit_kernels.kv_int4 import CacheLayout
from quantkit_kernels.kv_int4.layout import BLOCK_TOKENS
from vllm_quantkit.kv_calibration import FOLDER, KVCalibration, KVLayerRecord, KVSummary
from vllm_quantkit.quantize.kv_cache.moments import UNSTABLE

MOST_ROWS = 40
"""Of the table; of a model with more layers, the worst are shown."""

HEADINGS: tuple[str, ...] = ("layer", "cache", "keys", "plain", "calibrated", "fp8", "softmax")

WORDS = 3
"""Columns of the table that are no numbers."""

NAMED = 4
"""Layers that a sentence names at most."""


def table_lines(calibration: KVCalibration) -> list[str]:
    """A row for each layer, or the worst: output errors, and the softmax's."""
    rows = [HEADINGS]
    for record in _shown(calibration.summary.layers):
        formats = (record.uncalibrated, record.calibrated, record.fp8)
        cells = (f"{errors.output:.2%}" for errors in formats)
        cache = "4 bits" if record.dtype == "int4" else "16 bits"
        softmax = f"{record.calibrated.softmax:.4f}"
        rows.append((record.name, cache, record.treatment, *cells, softmax))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_row(row, widths) for row in rows]


def warnings(calibration: KVCalibration) -> list[str]:
    """A sentence for what may not hold for other text or longer contexts."""
    summary = calibration.summary
    unstable = [r.name for r in summary.layers if r.disagreement > UNSTABLE]
    drifting = [r.name for r in summary.layers if r.drift > UNSTABLE and _needs_shift(r, summary)]
    said = []
    if unstable:
        said.append(
            f"the halves of the calibration set disagree about the keys of {_names(unstable)} by "
            f"more than {UNSTABLE} of their spread: give more samples (--samples)."
        )
    if drifting:
        said.append(
            f"the mean of keys of {_names(drifting)} moves with position, and 4 bits do there only "
            f"less that mean, learnt on contexts of {summary.length} tokens: calibrate on samples "
            "as long as the contexts you serve (--length)."
        )
    return said


def closing_lines(calibration: KVCalibration, model: str, source: Path, out: Path) -> list[str]:
    """What stays in 16 bits, sizes, and the next command."""
    summary = calibration.summary
    kept = [record.name for record in summary.layers if record.dtype == "auto"]
    lines = [
        "plain, calibrated, fp8: how far the layer's output is off with a cache of 4 bits, with "
        "one of 4 bits so calibrated, and with one of 8; softmax: how far the softmax is off "
        f"(total variation), calibrated. On {summary.held_out_tokens:,} held-out tokens."
    ]
    if len(summary.layers) > MOST_ROWS:
        lines.append(f"the worst {MOST_ROWS} of {len(summary.layers)} layers are shown.")
    if kept:
        lines.append(
            f"{len(kept)} of {len(summary.layers)} layers keep a cache of 16 bits, because their "
            f"output error is beyond {summary.bound:.1%}: {_names(kept)}."
        )
    else:
        lines.append(f"all {len(summary.layers)} layers have a cache of 4 bits.")
    small, large = cache_bytes(summary)
    lines.append(
        f"cache: {small:,} bytes for each token, {large / small:.2f} times less than the "
        f"{large:,} of 16 bits."
    )
    return [*lines, f"serve it: {serve_command(model, source, out)}"]


def cache_bytes(summary: KVSummary) -> tuple[int, int]:
    """Bytes of a token in all layers: calibrated, and with 16 bits everywhere."""
    small = large = 0
    for record in summary.layers:
        layout = CacheLayout(record.head_size, BLOCK_TOKENS, summary.key_group, summary.value_group)
        whole = 2 * 2 * record.head_size * record.kv_heads
        large += whole
        small += layout.token_bytes * record.kv_heads if record.dtype == "int4" else whole
    return small, large


def serve_command(model: str, source: Path, out: Path) -> str:
    """How to serve with the calibration; inside the model's folder it is found by itself."""
    command = f"vllm serve {model} --quantization quantkit-kv4"
    if out.resolve() == (source / FOLDER).resolve():
        return command
    options = {"quantkit": {"kv_cache": {"calibration": str(out)}}}
    return f"{command} --additional-config '{json.dumps(options)}'"


def _row(cells: tuple[str, ...], widths: list[int]) -> str:
    """Words to the left, numbers to the right."""
    words = zip(cells[:WORDS], widths[:WORDS], strict=True)
    numbers = zip(cells[WORDS:], widths[WORDS:], strict=True)
    left = [cell.ljust(width) for cell, width in words]
    return "  ".join([*left, *(cell.rjust(width) for cell, width in numbers)])


def _shown(records: tuple[KVLayerRecord, ...]) -> list[KVLayerRecord]:
    if len(records) <= MOST_ROWS:
        return list(records)
    worst = sorted(records, key=lambda record: -record.calibrated.output)[:MOST_ROWS]
    return [record for record in records if record in worst]


def _needs_shift(record: KVLayerRecord, summary: KVSummary) -> bool:
    return record.dtype == "int4" and record.uncalibrated.output > summary.bound


def _names(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
