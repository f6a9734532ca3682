"""A report as one HTML file: no network, no script, no other file; for light and dark screens."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from vllm_quantkit.reporting.drawing import Picture
from vllm_quantkit.reporting.sections import Document, Section
from vllm_quantkit.terminal import Table

STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --paper: #ffffff; --line: #d0d7de; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --line: #3d444d; }
}
body { color: var(--ink); background: var(--paper); font: 1rem/1.5 system-ui, sans-serif;
  max-width: 50rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.25; }
figure { margin: 1.5rem 0; }
figure svg { width: 100%; height: auto; }
figcaption, caption { font-weight: 600; text-align: left; }
div.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: 0.3rem 0.8rem 0.3rem 0; text-align: left;
  vertical-align: top; font-variant-numeric: tabular-nums; }
tbody th { font-weight: 400; }
"""

LONG = 16
"""Rows from which a table waits to be opened."""


def render_html(document: Document) -> str:
    """The whole report; everything that came from outside is escaped."""
    title = escape(document.title)
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{title}</h1>",
            *(part for section in document.sections for part in _section(section)),
            "</main>",
            "</body>",
            "</html>",
            "",
        )
    )


def _section(section: Section) -> Iterator[str]:
    yield "<section>"
    yield f"<h2>{escape(section.title)}</h2>"
    yield from (f"<p>{escape(line)}</p>" for line in section.lines)
    yield from map(_figure, section.pictures)
    yield from map(_table, section.tables)
    yield "</section>"


def _figure(picture: Picture) -> str:
    caption = f'<figcaption id="{picture.name}-title">{escape(picture.title)}</figcaption>'
    described = f'<p id="{picture.name}-alt">{escape(picture.alt)}</p>'
    return f"<figure>\n{caption}\n{picture.inline}\n{described}\n</figure>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    body = "\n".join(map(_row, table.rows))
    heading = f"<thead><tr>{head}</tr></thead>\n" if any(table.columns) else ""
    caption = f"<caption>{escape(table.title)}</caption>\n" if table.title else ""
    drawn = (
        f'<div class="table">\n<table>\n{caption}{heading}<tbody>\n{body}\n</tbody></table></div>'
    )
    if len(table.rows) < LONG:
        return drawn
    return f"<details><summary>{escape(table.title)}</summary>\n{drawn}\n</details>"


def _row(row: tuple[str, ...]) -> str:
    first, *others = map(escape, row)
    cells = "".join(f"<td>{cell}</td>" for cell in others)
    return f'<tr><th scope="row">{first}</th>{cells}</tr>'
