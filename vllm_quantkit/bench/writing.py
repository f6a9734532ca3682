"""A benchmark's result as files: JSON, CSV and Markdown in a new folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vllm_quantkit.bench.results import BenchResult
from vllm_quantkit.bench.tables import doubts, long_table, result_table, sentences
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.terminal import to_json


def refuse_folder(folder: Path) -> None:
    """Nothing where a result can be written to `folder`.

    Raises:
        ConfigError: something is there already.
    """
    if folder.exists():
        raise ConfigError(f"--out {folder} exists: give a new folder, or remove it.")


def write_result(result: BenchResult, folder: Path) -> None:
    """`bench.json`, `bench.csv` and `bench.md` in `folder`, which appears when all are written.

    Raises:
        ConfigError: the folder exists by now, or cannot be written.
    """
    refuse_folder(folder)
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "bench.json").write_text(to_json(result), encoding="utf-8")
        (partial / "bench.csv").write_text(long_table(result).csv(), encoding="utf-8")
        (partial / "bench.md").write_text(markdown(result), encoding="utf-8")
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConfigError(
            f"the result cannot be written to {folder} ({error}): make room, or give another --out."
        ) from error


def markdown(result: BenchResult) -> str:
    """The table, what stands below it, and what to be warned of."""
    warnings = [f"- {text}" for text in doubts(result)]
    parts = ["# Speeds", result_table(result).markdown(), *sentences(result)]
    if warnings:
        parts += ["## Not concluded", "\n".join(warnings)]
    return "\n\n".join(parts) + "\n"
