"""One picture of several ways to serve a model: quality against speed, areas for memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vllm_quantkit.reporting.drawing import (
    BLUE,
    GREEN,
    PURPLE,
    VERMILION,
    Picture,
    draw,
    plain_ticks,
)
from vllm_quantkit.spec import Frozen

COLOURS = (BLUE, VERMILION, GREEN, PURPLE)

LARGEST = 900.0
"""Area of the largest point, square points (1/72 inch)."""


class Point(Frozen):
    """One way to serve the model.

    Attributes:
        label: of the point.
        x, y: its place; what they are is said by the picture's axes.
        size: what the point's area is proportional to.
    """

    label: str
    x: float
    y: float
    size: float


def trade_off_picture(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    size_label: str,
    title: str = "Quality against speed and memory",
) -> Picture | None:
    """A point for each way, its area as large as its size; None where no point has a place.

    Args:
        points: those without a finite x and y are left out.
        x_label, y_label: of the axes, with units.
        size_label: what areas stand for, with units.
        title: of the picture.
    """
    placed = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if not placed:
        return None
    largest = max(point.size for point in placed) or 1.0

    def paint(axes: Any) -> None:
        areas = [LARGEST * max(point.size, 0.0) / largest for point in placed]
        for place, point in enumerate(placed):
            colour = COLOURS[place % len(COLOURS)]
            axes.scatter(point.x, point.y, s=areas[place], color=colour, alpha=0.35, linewidths=0)
            axes.scatter(point.x, point.y, s=9, color=colour)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.margins(x=0.2, y=0.2)
        if min(point.y for point in placed) >= 0:
            axes.set_yticks([tick for tick in axes.get_yticks() if tick >= 0])
        plain_ticks(axes.yaxis)
        axes.set_title(f"areas: {size_label}", loc="right", fontsize="small")
        _label(axes, placed, areas)

    alt = "; ".join(f"{p.label}: {x_label} {p.x:.3g}, {y_label} {p.y:.3g}" for p in placed)
    return draw("trade_off", title, alt + ".", paint, (7.2, 4.6))


def _label(axes: Any, points: Sequence[Point], areas: Sequence[float]) -> None:
    """Each point's label beside it, where no other label or point is, as far as there is room."""
    axes.figure.draw_without_rendering()
    radii = [math.sqrt(area / math.pi) for area in areas]
    places = [(point.x, point.y) for point in points]
    taken = [_around(axes, *place, radius) for place, radius in zip(places, radii, strict=True)]
    for point, place, radius in zip(points, places, radii, strict=True):
        candidates = [_annotate(axes, point.label, place, radius, side) for side in SIDES]
        boxes = [text.get_window_extent() for text in candidates]
        crossed = [_crossed(axes, box, taken) for box in boxes]
        best = crossed.index(min(crossed))
        taken.append(boxes[best])
        for index, text in enumerate(candidates):
            if index != best:
                text.remove()


def _crossed(axes: Any, box: Any, taken: Sequence[Any]) -> int:
    """How many boxes one overlaps; leaving the axes counts as one for each side."""
    outside = sum(not axes.bbox.containsx(x) for x in (box.x0, box.x1))
    return outside + sum(bool(box.overlaps(other)) for other in taken)


SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 2), (0, -2))
"""Where a label may be, right and up of its point: the first that is free is taken."""


def _annotate(
    axes: Any, label: str, place: tuple[float, float], radius: float, side: tuple[int, int]
) -> Any:
    right, up = side
    return axes.annotate(
        label,
        place,
        (right * (radius + 3), up * (radius + 3)),
        textcoords="offset points",
        ha={1: "left", 0: "center", -1: "right"}[right],
        va="center" if not up else "bottom" if up > 0 else "top",
        fontsize="small",
    )


def _around(axes: Any, x: float, y: float, radius: float) -> Any:
    """The square of pixels around a point, whose radius is in points."""
    from matplotlib.transforms import Bbox

    across, up = axes.transData.transform((x, y))
    reach = radius * axes.figure.dpi / 72
    return Bbox([[across - reach, up - reach], [across + reach, up + reach]])
