"""What a command says: tables and progress for people, plain text in pipes, JSON for programs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as RichTable
from rich.text import Text

Tick = Callable[[], None]
"""Says that one step of a phase is done."""


@dataclass(frozen=True)
class Table:
    """Rows under columns, in whatever form they are wanted.

    Attributes:
        title: above the table; empty for none.
        columns: headings; all but the first are aligned to the right where they hold numbers.
        rows: one cell for each column.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def plain(self) -> str:
        """Columns aligned by spaces."""
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = "\n".join(self._aligned(line, widths) for line in lines)
        return f"{self.title}\n{text}" if self.title else text

    def markdown(self) -> str:
        """A Markdown table; the title is left out."""
        rule = "|" + "|".join("--:" if right else "---" for right in self._right) + "|"
        head, *body = ("| " + " | ".join(map(_escaped, row)) + " |" for row in self._lines())
        return "\n".join([head, rule, *body])

    def csv(self) -> str:
        """Comma-separated values, headings first."""
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows(self._lines())
        return stream.getvalue()

    def rich(self) -> RichTable:
        """For a terminal."""
        table = RichTable(title=self.title or None, title_justify="left")
        for name, right in zip(self.columns, self._right, strict=True):
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def _lines(self) -> Sequence[tuple[str, ...]]:
        return [self.columns, *self.rows]

    @property
    def _right(self) -> list[bool]:
        """Columns in which every cell that says something begins as a number does."""
        cells = zip(*self.rows, strict=True) if self.rows else ((),) * len(self.columns)
        return [bool(any(column)) and all(map(_is_figure, column)) for column in cells]

    def _aligned(self, line: Sequence[str], widths: Sequence[int]) -> str:
        columns = zip(line, widths, self._right, strict=True)
        cells = (cell.rjust(n) if right else cell.ljust(n) for cell, n, right in columns)
        return "  ".join(cells).rstrip()


class Terminal:
    """Where a command speaks.

    Results go to standard output, everything else to standard error.

    Args:
        as_json: the result is JSON, and nothing else is written to standard output.
        quiet: only results, warnings and errors.
        out: for results; standard output unless a test gives another.
        aside: for progress, notes and warnings; standard error.
    """

    def __init__(
        self,
        *,
        as_json: bool = False,
        quiet: bool = False,
        out: Console | None = None,
        aside: Console | None = None,
    ) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._out = out or _console(stderr=False)
        self.aside = aside or _console(stderr=True)

    def line(self, text: str = "") -> None:
        """A line of the result."""
        if not self.as_json:
            self._out.print(text)

    def table(self, table: Table) -> None:
        """A table of the result."""
        if self.as_json:
            return
        if self._out.is_terminal:
            self._out.print(table.rich())
        else:
            self._out.print(table.plain())

    def result(self, result: BaseModel | Mapping[str, Any]) -> None:
        """The whole result, which only `--json` shows."""
        if self.as_json:
            self._out.file.write(to_json(result))
            self._out.file.flush()

    def note(self, text: str) -> None:
        """Something by the way."""
        if not self.silent:
            self.aside.print(text)

    def warn(self, text: str) -> None:
        """What the user should know before trusting the result."""
        self.aside.print(Text.assemble(("warning:", "bold yellow"), " ", text))

    def error(self, text: str) -> None:
        """Why there is no result."""
        self.aside.print(Text.assemble(("error:", "bold red"), " ", text))

    @contextmanager
    def phase(self, name: str, steps: int) -> Iterator[Tick]:
        """Shows how far a phase of so many steps is, while it lasts."""
        if self.silent:
            yield _no_tick
        elif self.aside.is_terminal:
            with _bars(self.aside) as bars:
                task = bars.add_task(name, total=max(steps, 1))
                yield lambda: bars.advance(task)
        else:
            self.aside.print(f"{name} ...")
            yield _no_tick

    @property
    def silent(self) -> bool:
        """True where neither progress nor notes are wanted."""
        return self.quiet or self.as_json


def to_json(result: BaseModel | Mapping[str, Any], *, sort_keys: bool = False) -> str:
    """Indented JSON; infinite and undefined numbers, which JSON lacks, are strings.

    Pydantic reads such strings as numbers again.
    """
    text = json.dumps(
        _plain(result), indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False
    )
    return text + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="python"))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _console(*, stderr: bool) -> Console:
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False)


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _is_figure(cell: str) -> bool:
    text = cell.lstrip("+-~<>≈ ")
    return not text or text[0].isdigit()


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _no_tick() -> None:
    pass
