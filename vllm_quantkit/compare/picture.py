"""The table as a picture: quality against speed, areas for memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

from vllm_quantkit.compare.result import Comparison, RowResult
from vllm_quantkit.compare.table import MIB
from vllm_quantkit.reporting.drawing import Picture
from vllm_quantkit.reporting.trade_off import Point, trade_off_picture


def picture_of(comparison: Comparison) -> Picture | None:
    """A point for each row that has speeds; None where none has.

    Heights are KL divergences; without them, shares of the 16-bit model's weights.
    """
    batch = min(comparison.batches, default=None)
    if batch is None:
        return None
    judged = any(row.quality for row in comparison.rows)
    title = "Quality against speed and memory" if judged else "Memory against speed"
    if comparison.quick:
        title += " (quick: not to be quoted)"
    return trade_off_picture(
        list(_points(comparison, batch, judged=judged)),
        x_label=f"decode, batch of {batch}, times the 16-bit model",
        y_label="KL divergence from 16 bits, millinats" if judged else "weights, of 16-bit",
        size_label="weights, MiB",
        title=title,
    )


def _points(comparison: Comparison, batch: int, *, judged: bool) -> Iterator[Point]:
    for row in comparison.rows:
        if batch in row.decode and row.weight_bytes is not None:
            ratio = row.decode[batch].ratio
            yield Point(
                label=row.title,
                x=1.0 if ratio is None else ratio.median,
                y=_divergence(row) if judged else row.weight_share or math.nan,
                size=row.weight_bytes / MIB,
            )


def _divergence(row: RowResult) -> float:
    """Millinats; 0 for the 16-bit model, NaN where it was not measured."""
    if row.quality is None:
        return math.nan if row.failures or row.name != "16-bit" else 0.0
    return 1000 * row.quality.divergence.value
