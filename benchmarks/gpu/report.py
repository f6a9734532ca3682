"""Markdown of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.gpu.goals import GOALS, outcome
from benchmarks.gpu.results import Results, Row


def markdown(results: Results) -> str:
    """The whole report."""
    ceilings = results.ceilings
    parts = [
        "# Kernels on a GPU",
        f"{results.machine}. Measured in the same run: copies move {ceilings.copy / 1e12:.2f} TB/s "
        f"(read and written), cuBLAS makes {ceilings.product / 1e12:.0f} TFLOP/s in bfloat16.",
        "Medians of CUDA graphs whose calls go through weights that the cache does not hold. The "
        "share is that of the larger limit, memory or bfloat16 arithmetic, by the least bytes a "
        "call moves; 8-bit products may exceed it. `product` leaves out that activations are "
        "quantised.",
        "## Goals",
        goals_table(results),
        "## Milliseconds",
    ]
    for problem in dict.fromkeys(row.problem for row in results.rows):
        rows = [row for row in results.rows if row.problem == problem]
        n, k = rows[0].n, rows[0].k
        size = f"{n} x {k}" if rows[0].op == "linear" else f"{k} channels"
        parts += [f"### {problem}, {size}", times_table(rows, results)]
    parts += ["## Relative errors", errors(results)]
    parts += ["## Not measured", not_measured(results)]
    return "\n\n".join(parts) + "\n"


def goals_table(results: Results) -> str:
    """Each goal with its figure: the worst of all measurements, and their geometric mean."""
    head = ["kernel", "where", "measure", "goal", "worst", "mean", "of", "met"]
    lines = [
        [
            goal.kernel,
            goal.told,
            goal.measure,
            f"{goal.least:.2f}",
            f"{found.worst:.2f}" if found.count else "",
            f"{found.mean:.2f}" if found.count else "",
            str(found.count),
            found.met,
        ]
        for goal, found in ((goal, outcome(goal, results)) for goal in GOALS)
    ]
    return table(head, lines)


def times_table(rows: Sequence[Row], results: Results) -> str:
    """One problem: a line for each contender, a column for each number of tokens."""
    counts = sorted({row.m for row in rows})
    cells = {(row.contender, row.m): cell(row, results) for row in rows}
    names = dict.fromkeys(row.contender for row in sorted(rows, key=lambda row: row.kind))
    lines = [[name, *(cells.get((name, m), "") for m in counts)] for name in names]
    return table(["", *(f"M = {m}" for m in counts)], lines)


def cell(row: Row, results: Results) -> str:
    """Milliseconds, and the share of the limit."""
    least = results.ceilings.least_ms(row.nbytes, row.operations)
    return f"{row.ms:.4f} ({least / row.ms:.0%})" + ("" if row.graph else " no graph")


def errors(results: Results) -> str:
    """The largest of every contender, at any size."""
    largest: dict[tuple[str, str], float] = {}
    for verdict in results.verdicts:
        if not verdict.reason:
            key = verdict.op, verdict.contender
            largest[key] = max(verdict.error, largest.get(key, 0.0))
    return table(["", "contender", "error"], [[*who, f"{e:.1e}"] for who, e in largest.items()])


def not_measured(results: Results) -> str:
    """Who was left out and why, and for what time ran out."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for verdict in results.verdicts:
        if verdict.reason:
            key = verdict.contender, verdict.reason
            reasons.setdefault(key, []).append(verdict.problem)
    lines = [f"{who} ({', '.join(where)}): {why}" for (who, why), where in reasons.items()]
    lines += results.failures
    lines += [
        f"{problem} at M = {', '.join(map(str, sorted(counts)))}: time ran out"
        for problem, counts in results.unmeasured.items()
    ]
    return "\n".join(f"- {line}" for line in lines) or "Nothing was left out."


def table(head: Iterable[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


def summary(results: Results) -> str:
    """A few lines for the end of the output."""
    found = [outcome(goal, results) for goal in GOALS]
    counts = {word: sum(o.met == word for o in found) for word in ("yes", "**no**", "not measured")}
    return (
        f"{len(results.rows)} measurements; goals met {counts['yes']}, missed {counts['**no**']}, "
        f"not measured {counts['not measured']}"
    )
