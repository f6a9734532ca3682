"""The report that people read: a Markdown file with pictures, and an HTML file that holds all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_quantkit.one_step import write_in_one_step
from vllm_quantkit.reporting.document import document
from vllm_quantkit.reporting.drawing import HOW_TO_DRAW, can_draw
from vllm_quantkit.reporting.evaluation import Evaluation
from vllm_quantkit.reporting.html import render_html
from vllm_quantkit.reporting.markdown import render_markdown
from vllm_quantkit.reporting.pictures import NAMES

FOLDER = "quantkit_report"
"""Of the files, beside the checkpoint."""


@dataclass(frozen=True)
class ReportFiles:
    """What was written.

    Attributes:
        markdown, html: the two forms of the report.
        pictures: that the Markdown file shows.
        note: how to get pictures; empty where they were drawn.
    """

    markdown: Path
    html: Path
    pictures: tuple[Path, ...]
    note: str = ""


def write_report_files(folder: Path, evaluation: Evaluation) -> ReportFiles:
    """`quantkit_report/` in the checkpoint's folder: report.md, its pictures, and report.html.

    The HTML file is complete by itself: it needs no network, no script and no other file.

    Args:
        folder: of the checkpoint, or any other; made if need be.
        evaluation: what to report.

    Raises:
        CheckpointError: a file cannot be written.
    """
    out = folder / FOLDER
    found = document(evaluation)
    pictures = {out / f"{picture.name}.svg": picture for picture in found.pictures}
    for stale in (out / f"{name}.svg" for name in NAMES):
        if stale not in pictures:
            stale.unlink(missing_ok=True)
    for path, picture in pictures.items():
        write_in_one_step(path, picture.file)
    files = ReportFiles(
        out / "report.md", out / "report.html", tuple(pictures), "" if can_draw() else HOW_TO_DRAW
    )
    write_in_one_step(files.markdown, render_markdown(found))
    write_in_one_step(files.html, render_html(found))
    return files
