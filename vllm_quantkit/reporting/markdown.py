"""A report in Markdown; its pictures are files beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from vllm_quantkit.reporting.sections import Document, Section
from vllm_quantkit.terminal import Table

MARKS = re.compile(r"[\\`*\[\]]|(?<!\w)_|_(?!\w)")
"""What Markdown takes for its own; an underscore within a word is none."""


def render_markdown(document: Document) -> str:
    """The report; pictures are named `<name>.svg`, relative to its folder."""
    parts = [f"# {_plain(document.title)}"]
    for section in document.sections:
        parts += _section(section)
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> Iterator[str]:
    yield f"## {_plain(section.title)}"
    yield from map(_plain, section.lines)
    for picture in section.pictures:
        yield f"![{_plain(picture.alt)}]({picture.name}.svg)"
    for table in section.tables:
        if table.title:
            yield f"### {_plain(table.title)}"
        yield _escaped(table).markdown()


def _escaped(table: Table) -> Table:
    rows = tuple(tuple(map(_plain, row)) for row in table.rows)
    return Table(table.title, tuple(map(_plain, table.columns)), rows)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: names may hold its marks, or HTML's."""
    return MARKS.sub(r"\\\g<0>", html.escape(text, quote=False))
