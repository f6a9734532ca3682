"""The table as files: Markdown, CSV, JSON and a picture, each there whole or not at all."""

from __future__ import annotations

from pathlib import Path

from vllm_quantkit.compare.notes import doubts_of, notes_below
from vllm_quantkit.compare.picture import picture_of
from vllm_quantkit.compare.result import Comparison
from vllm_quantkit.compare.table import for_programs, readable
from vllm_quantkit.one_step import write_in_one_step
from vllm_quantkit.reporting.drawing import HOW_TO_DRAW, can_draw
from vllm_quantkit.terminal import to_json

NAME = "table"


def write_files(comparison: Comparison, folder: Path, name: str = NAME) -> str:
    """`table.md`, `.csv`, `.json` and `.svg` in `folder`; those of an earlier run are replaced.

    Args:
        comparison: what to write.
        folder: made if need be.
        name: of the files, without an ending.

    Returns:
        Why there is no picture; empty where there is, or nothing to show.

    Raises:
        CheckpointError: a file cannot be written.
    """
    picture = picture_of(comparison) if can_draw() else None
    svg = folder / f"{name}.svg"
    if picture is None:
        svg.unlink(missing_ok=True)
    else:
        write_in_one_step(svg, picture.file)
    shown = None if picture is None else f"![{picture.title}]({svg.name})"
    write_in_one_step(folder / f"{name}.csv", for_programs(comparison).csv())
    write_in_one_step(folder / f"{name}.json", to_json(comparison))
    write_in_one_step(folder / f"{name}.md", markdown(comparison, shown))
    return "" if can_draw() else HOW_TO_DRAW


def markdown(comparison: Comparison, picture: str | None = None) -> str:
    """The table, the picture, and what stands below them."""
    parts = [
        f"# What quantising {comparison.model} costs and gains",
        readable(comparison).markdown(),
    ]
    parts += [] if picture is None else [picture]
    parts += list(notes_below(comparison))
    if doubts := [f"- {text}" for text in doubts_of(comparison)]:
        parts += ["## Missing or not concluded", "\n".join(doubts)]
    return "\n\n".join(parts) + "\n"
