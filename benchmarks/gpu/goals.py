"""How fast the kernels are to be, as data, and what was measured beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import geometric_mean

from benchmarks.gpu.problems import Op
from benchmarks.gpu.results import Results, Row

Where = Callable[[Row], bool]

MANY_WEIGHTS = 58_000_000
"""From here on, a weight of 4 bits fills the GPU for long enough to reach its bandwidth."""

MACHETE, MARLIN = "Machete W4A16 g128", "Marlin W4A16 g128"
BEST_PEER = (MARLIN, MACHETE)
CUBLAS = ("cuBLAS bf16",)
BANDWIDTH = ()
"""In the place of peers: the share of the copy's bandwidth."""


@dataclass(frozen=True)
class Goal:
    """One row of the table.

    Attributes:
        kernel: of ours.
        where: which measurements count.
        told: the same in words.
        least: the goal.
        peers: the fastest of them is compared with; `BANDWIDTH` for a share of the copy's.
        mean: True where the geometric mean counts instead of the worst measurement.
        op: what is computed.
    """

    kernel: str
    told: str
    where: Where
    least: float
    peers: tuple[str, ...] = BANDWIDTH
    mean: bool = False
    op: Op = "linear"

    @property
    def measure(self) -> str:
        """What is measured, in words."""
        if self.peers == BANDWIDTH:
            return "share of copy bandwidth"
        return (
            "speed over "
            + ("the better of " if len(self.peers) > 1 else "")
            + " and ".join(self.peers)
        )


@dataclass(frozen=True)
class Outcome:
    """What became of a goal.

    Attributes:
        goal: which.
        worst, mean: of the measured figures; NaN where there are none.
        count: how many there are.
    """

    goal: Goal
    worst: float
    mean: float
    count: int

    @property
    def figure(self) -> float:
        """What counts."""
        return self.mean if self.goal.mean else self.worst

    @property
    def met(self) -> str:
        """yes, no, or not measured."""
        if not self.count:
            return "not measured"
        return "yes" if self.figure >= self.goal.least else "**no**"


def rows(*counts: int) -> Where:
    """At these numbers of tokens."""
    return lambda row: row.m in counts


def between(low: int, high: int) -> Where:
    """At these numbers of tokens, and those between."""
    return lambda row: low <= row.m <= high


def both(*conditions: Where) -> Where:
    """Where all hold."""
    return lambda row: all(condition(row) for condition in conditions)


def is_large(row: Row) -> bool:
    """Layers whose weight alone fills the GPU."""
    return row.n * row.k >= MANY_WEIGHTS


def is_small_8b(row: Row) -> bool:
    """qkv and o of a model of 8 B parameters."""
    return row.problem in ("Llama-3-8B qkv", "Llama-3-8B o")


def everywhere(row: Row) -> bool:
    """All."""
    return True


W4 = "quantkit W4A16 g128"
W4_G32 = "quantkit W4A16 g32 asym"
W8 = "quantkit W8A16"
FP8, FP8_PRODUCT = "quantkit FP8", "quantkit FP8, product"
BLOCK, BLOCK_PRODUCT = "quantkit FP8 block", "quantkit FP8 block, product"
INT8 = "quantkit W8A8"
LLM_INT8 = "quantkit LLM.int8"
FUSED = ("quantkit FP8 rows", "quantkit INT8 rows", "quantkit FP8 block rows")

LARGE_FEW = both(between(1, 16), is_large)
SMALL_FEW = both(between(1, 16), is_small_8b)
FEW_SHAPES = "M = 1 to 16, N K of 58 M and more"
SLOWER_ALLOWED = 1.12
"""Zero-points and groups of 32 may cost this."""

GOALS = (
    Goal(W4, FEW_SHAPES, LARGE_FEW, 0.80),
    Goal(W4, FEW_SHAPES, LARGE_FEW, 3.0, CUBLAS),
    Goal(W4, f"{FEW_SHAPES}, geometric mean", LARGE_FEW, 1.10, BEST_PEER, mean=True),
    Goal(W4, FEW_SHAPES, LARGE_FEW, 0.95, BEST_PEER),
    Goal(W4, "M = 1 to 16, qkv and o of an 8B", SMALL_FEW, 1.0, BEST_PEER),
    Goal(W4, "everywhere", everywhere, 3.0, ("vLLM Triton W4A16 g128",)),
    Goal(W4, "M = 32", rows(32), 1.0, BEST_PEER),
    Goal(W4, "M = 32", rows(32), 2.2, CUBLAS),
    Goal(W4, "M = 64", rows(64), 1.0, BEST_PEER),
    Goal(W4, "M = 64", rows(64), 1.6, CUBLAS),
    Goal(W4, "M = 128 to 512", between(128, 512), 0.90, (MACHETE,)),
    Goal(W4, "M = 128", rows(128), 1.1, CUBLAS),
    Goal(W4, "M = 256", rows(256), 0.9, CUBLAS),
    Goal(W4, "M = 512", rows(512), 0.8, CUBLAS),
    Goal(W4, "M = 2048", rows(2048), 0.88, CUBLAS),
    Goal(W4, "M = 4096", rows(4096), 0.93, CUBLAS),
    Goal(W4_G32, "everywhere", everywhere, 1 / SLOWER_ALLOWED, (W4,)),
    Goal(W8, "M = 1 to 16", between(1, 16), 0.80),
    Goal(W8, "M = 1 to 16", between(1, 16), 1.7, CUBLAS),
    Goal(W8, "M = 1 to 16", between(1, 16), 1.05, ("Marlin W8A16",)),
    Goal(FP8_PRODUCT, "M = 1 to 64", between(1, 64), 1.0, ("CUTLASS FP8, product",)),
    Goal(FP8, "M = 1 to 64", between(1, 64), 1.15, ("CUTLASS FP8",)),
    Goal(FP8, "M = 1024 and more", between(1024, 4096), 0.85, ("CUTLASS FP8",)),
    Goal(BLOCK_PRODUCT, "M = 1 to 64", between(1, 64), 0.95, ("DeepGEMM FP8 block, product",)),
    Goal(BLOCK_PRODUCT, "everywhere", everywhere, 1.2, ("vLLM Triton FP8 block, product",)),
    Goal(INT8, "M = 1 to 64", between(1, 64), 1.2, ("CUTLASS W8A8",)),
    Goal(INT8, "M = 1024 and more", between(1024, 4096), 0.85, ("CUTLASS W8A8",)),
    Goal(LLM_INT8, "everywhere", everywhere, 4.0, ("bitsandbytes LLM.int8",)),
    Goal(LLM_INT8, "M = 1 to 32", between(1, 32), 1.0, CUBLAS),
    *(
        Goal(kernel, f"{told}, M = 4096 and more", between(4096, 1 << 20), 0.85, op=op)
        for op, told in (("add_rms_norm", "add + RMSNorm"), ("silu_mul", "SiLU * up"))
        for kernel in FUSED
    ),
)


def outcome(goal: Goal, results: Results) -> Outcome:
    """Compare a goal with what was measured."""
    peers = [results.milliseconds(goal.op, peer) for peer in goal.peers]
    figures = []
    for row in results.rows:
        if row.op != goal.op or row.contender != goal.kernel or not goal.where(row):
            continue
        if goal.peers == BANDWIDTH:
            figures.append(row.bandwidth / results.ceilings.copy)
            continue
        others = [times[row.problem, row.m] for times in peers if (row.problem, row.m) in times]
        if others:
            figures.append(min(others) / row.ms)
    if not figures:
        return Outcome(goal, math.nan, math.nan, 0)
    return Outcome(goal, min(figures), geometric_mean(figures), len(figures))
