"""The search: from the heuristic's tile to better neighbours, until none is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from benchmarks.tune.candidates import neighbours
from benchmarks.tune.jobs import Job
from benchmarks.tune.record import Candidate, Finding, Record
from quantkit_kernels.tile_choice import KERNELS
from quantkit_kernels.tuning import Device

MARGIN = 1.02
"""A tile must be so many times as fast as another to replace it: less is within the noise."""

QUICK_ROUNDS, LAST_ROUNDS = 3, 9
"""Turns of a race among neighbours, and of the last one, whose figures are kept."""


class Trial(Protocol):
    """A job with its data, ready to be cut in any way."""

    def fault(self, tile: Any) -> str:
        """Why a tile must not be timed, in words; empty where its results are right."""

    def race(self, tiles: Sequence[Any], rounds: int) -> Mapping[Any, float]:
        """Median milliseconds per call of tiles that take turns."""


Prepare = Callable[[Job], Trial]
"""Makes a job's data."""


class GpuLostError(Exception):
    """After a fault in a tile, the GPU answers this process no more.

    Attributes:
        tile: which.
        reason: what happened.
    """

    def __init__(self, tile: Any, reason: str) -> None:
        super().__init__(f"{tile} {reason}. The GPU is lost to this process; run this again")
        self.tile, self.reason = tile, reason


def tune(
    record: Record,
    jobs: Sequence[Job],
    prepare: Prepare,
    device: Device,
    seconds_left: Callable[[], float],
    save: Callable[[], None],
    say: Callable[[str], None],
) -> int:
    """Find tiles for all jobs that the record does not have; save after each.

    Stops before a job when no time is left.

    Returns:
        how many jobs failed: the GPU has no room for them, or nothing that multiplies them.

    Raises:
        GpuLostError: the record then has the tile, and the next run leaves it out.
    """
    failed, missing = 0, record.missing(jobs)
    if not missing:
        say(f"All {len(jobs)} jobs are measured already; nothing is to do.")
    for number, job in enumerate(missing):
        if seconds_left() <= 0:
            say(f"Out of time: {len(missing) - number} jobs are left. Run this again to go on.")
            break
        try:
            finding = search(job, prepare(job), device, record.lethal.get(job, {}))
        except GpuLostError as lost:
            known = record.lethal.setdefault(job, {})
            known[lost.tile] = Candidate(lost.tile, reason=lost.reason)
            save()
            raise
        except (RuntimeError, ValueError) as error:
            failed += 1
            say(f"{job} cannot be measured: {error}")
            continue
        record.findings[job] = finding
        save()
        tiles = len(finding.tried)
        say(f"{job}: {finding.ms:.4f} ms, {finding.gain:.2f}x the heuristic's, of {tiles} tiles")
    return failed


def search(
    job: Job, trial: Trial, device: Device, lethal: Mapping[Any, Candidate] = MappingProxyType({})
) -> Finding:
    """The best tile that steps from the heuristic's lead to.

    Args:
        job: what is tuned.
        trial: its data.
        device: the GPU.
        lethal: tiles that must not be tried again.

    Raises:
        RuntimeError: the heuristic's own tile is wrong.
        GpuLostError: see there.
    """
    start = best = KERNELS[job.product.kernel].heuristic(job.product, job.bucket, device)
    tried = dict(lethal)
    if start not in tried:
        tried[start] = Candidate(start, reason=trial.fault(start))
    if tried[start].reason:
        raise RuntimeError(f"the heuristic's tile {start} {tried[start].reason}")
    while True:
        near = [tile for tile in neighbours(best, job.product, device) if tile not in tried]
        tried |= {tile: Candidate(tile, reason=trial.fault(tile)) for tile in near}
        right = [tile for tile in near if not tried[tile].reason]
        if not right:
            break
        times = trial.race([best, *right], QUICK_ROUNDS)
        tried |= {tile: Candidate(tile, ms) for tile, ms in times.items()}
        fastest = min(right, key=times.__getitem__)
        if times[fastest] * MARGIN > times[best]:
            break
        best = fastest
    return _finish(job, trial, start, best, tried)


def _finish(
    job: Job, trial: Trial, start: Any, best: Any, tried: Mapping[Any, Candidate]
) -> Finding:
    """One more race, between the heuristic's tile and the best."""
    times = trial.race(list(dict.fromkeys((start, best))), LAST_ROUNDS)
    if times[best] * MARGIN > times[start]:
        best = start
    return Finding(job, best, times[best], times[start], tuple(tried.values()))
