"""Linear layers and fused quantisation on a GPU: ours beside everyone's, in one run.

    python -m benchmarks.gpu --budget-minutes 9

Correctness first: each contender is judged in a process of its own, on poisoned memory, against
its definition; one that fails or is missing is listed with the reason, and not timed. Then all take
turns as CUDA graphs, over weights that no cache holds. Problems come in the order of their weight
in the goals, and results are written after each, so a run that is stopped loses nothing:
`--resume` measures what is missing.

Without a GPU it runs small problems on the CPU, which only shows that it runs.

On a machine without installed packages or network, put the repository, its folder `kernels` and
vLLM on PYTHONPATH; nothing here needs an installed distribution.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.contender import Contender
from benchmarks.gpu.field import contenders
from benchmarks.gpu.gate import judge_apart
from benchmarks.gpu.picture import draw
from benchmarks.gpu.problems import PROBLEMS, SMALL, Problem
from benchmarks.gpu.race import Course, measure_ceilings
from benchmarks.gpu.report import goals_table, markdown, summary
from benchmarks.gpu.results import Results
from vllm_quantkit.hardware.machine import describe_machine

RESULTS = Path("benchmarks/results")
GATE_SHARE = 0.35
"""Of the budget: after it, contenders that are still being judged are left out."""

MAX_JOBS = 12
"""Processes of the gate at a time: each has a CUDA context and a layer or two."""


def measure(
    results: Results,
    problems: Sequence[Problem],
    field: Sequence[Contender],
    budget: Budget,
    save: Callable[[], None],
) -> None:
    """Race through the problems until the budget is spent; call `save` after each.

    Numbers of tokens that `results` has already are not measured again.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    passed = {(v.contender, v.op, v.problem) for v in results.verdicts if not v.reason}
    for problem in problems:
        done = {row.m for row in results.rows if row.problem == problem.name}
        wanted = [m for m in problem.rows if m not in done]
        starters = [c for c in field if (c.name, c.op, problem.name) in passed]
        if wanted and starters and budget.left > 0:
            course = Course(problem, starters, device, results.failures.append)
            while wanted and budget.left > 0:
                results.rows += course.run(wanted.pop(0), results.ceilings)
            del course
            torch.cuda.empty_cache()
        if wanted and starters:
            results.unmeasured[problem.name] = wanted
        else:
            results.unmeasured.pop(problem.name, None)
        save()
        print(f"{problem.name}: {budget.left:.0f} s left", flush=True)


def begin(
    options: argparse.Namespace, path: Path, field: Sequence[Contender], budget: Budget
) -> Results:
    """Earlier results with `--resume`, or new ones with all contenders judged."""
    if options.resume and path.exists():
        return Results.load(path)
    judging = {
        "small": options.small,
        "jobs": options.jobs,
        "seconds": GATE_SHARE * budget.seconds,
    }
    verdicts = judge_apart(field, **judging)
    print(f"{len(field)} contenders are judged: {budget.left:.0f} s left", flush=True)
    return Results(describe_machine(), measure_ceilings(), verdicts=verdicts)


def main() -> None:
    """Entry point."""
    options = _parse_arguments()
    budget = Budget.begin(60 * options.budget_minutes)
    torch.set_float32_matmul_precision("highest")
    field = contenders(options.only)
    results = begin(options, options.json, field, budget)

    def save() -> None:
        results.save(options.json)
        options.json.with_suffix(".md").write_text(markdown(results))

    save()
    try:
        measure(results, SMALL if options.small else PROBLEMS, field, budget, save)
    except RuntimeError as error:  # the GPU is of no more use to this process
        results.failures.append(f"The race broke off: {str(error).strip().splitlines()[0]}")
        save()
    print(goals_table(results))
    print(summary(results))
    try:
        draw(results, options.json.with_suffix(".svg"))
    except ImportError as error:
        print(f"No picture: {error}. Install matplotlib, then run `benchmarks.gpu.picture`.")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = min(MAX_JOBS, os.cpu_count() or 1)
    parser.add_argument("--budget-minutes", type=float, default=9)
    parser.add_argument("--only", default="", help="contenders whose name holds this")
    parser.add_argument("--jobs", type=int, default=jobs, help="processes of the gate at a time")
    parser.add_argument("--resume", action="store_true", help="keep what the file has")
    parser.add_argument(
        "--small", action="store_true", default=not torch.cuda.is_available(), help="small problems"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu_linear.json")
    options = parser.parse_args()
    if options.small and options.json == RESULTS / "gpu_linear.json":
        options.json = Path(".cache/bench/gpu/small.json")
    return options


if __name__ == "__main__":
    main()
