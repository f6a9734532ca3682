"""What a report is made of, whatever it is written in: headings, sentences, tables, pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vllm_quantkit.evaluate.intervals import Interval
from vllm_quantkit.reporting.drawing import Picture, can_draw
from vllm_quantkit.terminal import Table


@dataclass(frozen=True)
class Section:
    """A heading and what belongs under it.

    Attributes:
        title: the heading.
        lines: sentences, each a paragraph or an item.
        tables: with their titles.
        pictures: none where they cannot be drawn.
    """

    title: str
    lines: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        title: its heading.
        sections: in order.
    """

    title: str
    sections: tuple[Section, ...]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Of all sections."""
        return tuple(picture for section in self.sections for picture in section.pictures)


def drawn(*paintings: Callable[[], Picture | None]) -> tuple[Picture, ...]:
    """Those that have something to show; none where nothing can be drawn."""
    found = [paint() for paint in paintings] if can_draw() else []
    return tuple(picture for picture in found if picture is not None)


def cells(interval: Interval, form: str) -> tuple[str, str, str]:
    """The figure and its bounds, each as `form` says."""
    return (
        form.format(interval.value),
        form.format(interval.low),
        form.format(interval.high),
    )


def in_one_cell(interval: Interval, form: str) -> str:
    """The figure, and its bounds in brackets."""
    value, low, high = cells(interval, form)
    return f"{value} ({low} to {high})"
