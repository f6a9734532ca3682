"""What was measured so far: a file that is whole at any moment, and the table made of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.tune.jobs import Job
from quantkit_kernels.tile_choice import KERNELS
from quantkit_kernels.tuning_tables import Product, file_name, render_table


@dataclass(frozen=True)
class Candidate:
    """A tile that was tried.

    Attributes:
        tile: how the product was cut.
        ms: median per call; None where it was not timed to the end.
        reason: why it could not win; empty where it could.
    """

    tile: Any
    ms: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Finding:
    """The outcome of a job.

    Attributes:
        job: what was tuned.
        best: the tile that serves it from now on.
        ms, heuristic_ms: medians per call of that tile and of the heuristic's, from one race.
        tried: everything, the winner too.
    """

    job: Job
    best: Any
    ms: float
    heuristic_ms: float
    tried: tuple[Candidate, ...]

    @property
    def gain(self) -> float:
        """How many times as fast as the heuristic's tile the best one is."""
        return self.heuristic_ms / self.ms


class RecordError(Exception):
    """A record cannot be continued; says why and what to do."""


@dataclass
class Record:
    """All findings on one GPU.

    Attributes:
        gpu: its name.
        measured: versions it was measured with.
        findings: by job.
        lethal: by job, tiles that made the GPU unusable, not to be tried again.
    """

    gpu: str
    measured: str
    findings: dict[Job, Finding] = field(default_factory=dict)
    lethal: dict[Job, dict[Any, Candidate]] = field(default_factory=dict)

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Jobs without a finding."""
        return [job for job in jobs if job not in self.findings]

    def save(self, folder: Path) -> None:
        """Write record and table, each whole or not at all."""
        content = {
            "gpu": self.gpu,
            "measured": self.measured,
            "findings": [_written(finding) for finding in self.findings.values()],
            "lethal": [
                {**_written_job(job), "tried": _written_tried(found.values())}
                for job, found in self.lethal.items()
            ],
        }
        _replace(record_file(folder, self.gpu), json.dumps(content, indent=1) + "\n")
        tiles = {(job.product, job.bucket): found.best for job, found in self.findings.items()}
        _replace(folder / file_name(self.gpu), render_table(self.gpu, self.measured, tiles))


def record_file(folder: Path, gpu: str) -> Path:
    """Where a GPU's record is."""
    return folder / file_name(gpu).replace(".json", ".record.json")


def open_record(folder: Path, gpu: str, measured: str) -> Record:
    """The record in a folder, or a new one.

    Raises:
        RecordError: it was made with other versions, or is damaged.
    """
    file = record_file(folder, gpu)
    if not file.exists():
        return Record(gpu, measured)
    try:
        content = json.loads(file.read_text())
        found = Record(content["gpu"], content["measured"])
        findings = [_read(entry) for entry in content["findings"]]
        lethal = [(_read_job(entry), _read_tried(entry)) for entry in content["lethal"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{file} is damaged ({error!r}); delete it to start anew") from error
    if (found.gpu, found.measured) != (gpu, measured):
        raise RecordError(
            f"{file} was measured on {found.gpu} with {found.measured}, but this is {gpu} with "
            f"{measured}; give another --out, or delete it to start anew"
        )
    found.findings = {finding.job: finding for finding in findings}
    found.lethal = {job: {one.tile: one for one in tried} for job, tried in lethal}
    return found


def _written_job(job: Job) -> dict[str, Any]:
    return {**job.product._asdict(), "bucket": job.bucket}


def _written_tried(tried: Iterable[Candidate]) -> list[dict[str, Any]]:
    return [asdict(candidate) for candidate in tried]


def _written(finding: Finding) -> dict[str, Any]:
    return {
        **_written_job(finding.job),
        "best": asdict(finding.best),
        "ms": finding.ms,
        "heuristic_ms": finding.heuristic_ms,
        "tried": _written_tried(finding.tried),
    }


def _read_job(entry: dict[str, Any]) -> Job:
    return Job(Product(*(entry[name] for name in Product._fields)), entry["bucket"])


def _read_tried(entry: dict[str, Any]) -> tuple[Candidate, ...]:
    kind = KERNELS[entry["kernel"]].tile
    found = [Candidate(kind(**one["tile"]), one["ms"], one["reason"]) for one in entry["tried"]]
    return tuple(found)


def _read(entry: dict[str, Any]) -> Finding:
    kind = KERNELS[entry["kernel"]].tile
    return Finding(
        job=_read_job(entry),
        best=kind(**entry["best"]),
        ms=entry["ms"],
        heuristic_ms=entry["heuristic_ms"],
        tried=_read_tried(entry),
    )


def _replace(file: Path, text: str) -> None:
    """Write a file so that it is never seen half written."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    os.replace(partial, file)
