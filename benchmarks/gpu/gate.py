"""Correctness first: a contender is compared with its definition, in a process of its own.

    python -m benchmarks.gpu.gate "quantkit W4A16 g128" linear

A contender that reads or writes where it must not takes its process down and no other. As a second
use, the process compiles every Triton kernel that is timed later, and leaves it in Triton's cache.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from benchmarks.gpu.contender import Contender
from benchmarks.gpu.field import find
from benchmarks.gpu.inputs import (
    Loaded,
    activations,
    checked_rows,
    expected,
    load,
    poisoned,
    relative_error,
)
from benchmarks.gpu.problems import PROBLEMS, SMALL, Op, Problem
from benchmarks.gpu.timing import capture

LOGS = Path(".cache/bench/gpu")


@dataclass(frozen=True)
class Verdict:
    """What became of a contender in a problem.

    Attributes:
        contender, op, problem: names.
        error: the largest relative error at any number of tokens; NaN where there is none.
        reason: why it is not timed; empty where it is.
    """

    contender: str
    op: str
    problem: str
    error: float = float("nan")
    reason: str = ""


def judge(contender: Contender, problems: Iterable[Problem], device: str) -> Iterator[Verdict]:
    """A verdict for each problem of the contender's operation; whatever it raises is a reason."""
    for problem in problems:
        if problem.op != contender.op:
            continue
        verdict = partial(Verdict, contender.name, contender.op, problem.name)
        try:
            error = largest_error(contender, problem, device)
        except Exception as reason:
            lines = str(reason).strip().splitlines() or [""]
            yield verdict(reason=f"{type(reason).__name__}: {lines[0]}"[:300])
            continue
        above = f"is off by {error:.1e} of the result, more than {contender.max_error:.1e}"
        yield verdict(error=error, reason="" if error <= contender.max_error else above)


def largest_error(contender: Contender, problem: Problem, device: str) -> float:
    """The largest at any number of tokens, each with fresh random activations."""
    generator = torch.Generator(device).manual_seed(torch.seed() % (1 << 31))
    loaded = load(contender, problem, generator)
    errors = [error_of(contender, loaded, problem, m, generator) for m in problem.rows]
    return float("nan") if any(map(math.isnan, errors)) else max(errors)


def error_of(
    contender: Contender, loaded: Loaded, problem: Problem, m: int, generator: torch.Generator
) -> float:
    """Of a call, and of a replay where the contender is to be timed as a CUDA graph."""
    x = activations(contender, problem, m, generator)
    rows = checked_rows(m, x.device)
    inputs = loaded.layer.prepare(x)
    truth = expected(loaded, problem, x, inputs, rows)
    with poisoned():
        results = [loaded.layer(inputs)]
        if x.is_cuda and contender.graph:
            results.append(replayed(loaded, x))
    values = [loaded.layer.value(result) for result in results]
    errors = [relative_error(y[rows], truth) for y in values]
    finite = all(bool(y.isfinite().all()) for y in values)
    return max(errors) if finite else float("nan")


def replayed(loaded: Loaded, x: Tensor) -> object:
    """The result of a CUDA graph's first replay; the call was made before."""
    graph, result = capture(partial(loaded.layer, loaded.layer.prepare(x)))
    graph.replay()
    torch.cuda.synchronize()
    return result


def judge_apart(
    contenders: Sequence[Contender],
    *,
    small: bool,
    jobs: int,
    seconds: float,
    python: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu.gate"),
) -> list[Verdict]:
    """Verdicts of all contenders, each judged in a process of its own.

    Args:
        contenders: any.
        small: try `SMALL` problems only.
        jobs: processes at a time.
        seconds: that all of them may take; processes are killed then, and what they said counts.
        python: the command before its arguments.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    run = partial(_judge_one, small=small, end=end, python=python)
    with ThreadPoolExecutor(jobs) as pool:
        return [verdict for verdicts in pool.map(run, contenders) for verdict in verdicts]


def _judge_one(
    contender: Contender, small: bool, end: float, python: Sequence[str]
) -> list[Verdict]:
    command = [*python, contender.name, contender.op, *(["--small"] if small else [])]
    log = LOGS / f"{contender.op} {contender.name}.log".replace(" ", "-")
    out = log.with_suffix(".jsonl")
    reason = "it was not judged in time, compilation included"
    with log.open("w") as errors, out.open("w") as answers:
        seconds = end - time.monotonic()
        if seconds > 0:
            with suppress(subprocess.TimeoutExpired):
                status = subprocess.call(command, stdout=answers, stderr=errors, timeout=seconds)
                reason = f"its process ended with status {status}; see {log}"
    found = {v.problem: v for v in map(_read, out.read_text().splitlines()) if v is not None}
    missing = partial(Verdict, contender.name, contender.op, reason=reason)
    problems = [p for p in (SMALL if small else PROBLEMS) if p.op == contender.op]
    return [found.get(problem.name) or missing(problem.name) for problem in problems]


def _read(line: str) -> Verdict | None:
    """The verdict on a line; None of what a library printed."""
    return Verdict(**json.loads(line)) if line.startswith("{") and line.endswith("}") else None


def main() -> None:
    """Judge one contender; a JSON object for each verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("op")
    parser.add_argument("--small", action="store_true", help="only problems of no interest")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*deterministic")
    torch.set_float32_matmul_precision("highest")
    contender = find(options.name, cast("Op", options.op))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for verdict in judge(contender, SMALL if options.small else PROBLEMS, device):
        print(json.dumps(asdict(verdict)), flush=True)


if __name__ == "__main__":
    main()
