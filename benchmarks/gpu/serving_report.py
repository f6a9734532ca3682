"""Speeds of engines, their goals, and a table of both."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.gpu.report import table
from benchmarks.gpu.serving_models import (
    AWQ,
    AWQ_KV4,
    BF16,
    FP8,
    VLLM_AWQ,
    VLLM_FP8,
    VLLM_W8A8,
    W8A8,
)

ONE, LONG = "decode, 1 sequence", "decode, 1 sequence, long context"


@dataclass(frozen=True)
class Goal:
    """Ours is to be so many times as fast as a peer."""

    measure: str
    ours: str
    peer: str
    least: float


GOALS = (
    Goal(ONE, AWQ, BF16, 2.6),
    Goal(ONE, AWQ, VLLM_AWQ, 1.0),
    Goal(ONE, FP8, BF16, 1.7),
    Goal(ONE, FP8, VLLM_FP8, 1.0),
    Goal(ONE, W8A8, BF16, 1.6),
    Goal(ONE, W8A8, VLLM_W8A8, 1.0),
    Goal(LONG, AWQ_KV4, BF16, 3.0),
)


@dataclass
class Speeds:
    """What was measured, and where.

    Attributes:
        machine: GPU and versions.
        rates: measure to engine to the tokens/s of every round.
        failures: engine to why it did not run.
        unmeasured: engines for which time ran out.
    """

    machine: str
    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    unmeasured: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Speeds:
        """What a file has, to go on from: whatever was missing is tried again."""
        return cls(**json.loads(path.read_text()) | {"failures": {}, "unmeasured": []})

    def per_second(self, measure: str, engine: str) -> float | None:
        """The median of tokens/s; None where there are none."""
        rounds = self.rates.get(measure, {}).get(engine)
        return median(rounds) if rounds else None


def report(speeds: Speeds) -> str:
    """Markdown: speeds beside bf16's, goals, and what is missing."""
    names = list(dict.fromkeys(n for row in speeds.rates.values() for n in row))
    lines = [[label, *(cell(speeds, label, name) for name in names)] for label in speeds.rates]
    goals = [
        [
            goal.measure,
            goal.ours,
            goal.peer,
            f"{goal.least:.1f}x",
            "not measured" if found is None else f"{found:.2f}x",
            "" if found is None else "yes" if found >= goal.least else "**no**",
        ]
        for goal, found in ((goal, ratio(speeds, goal)) for goal in GOALS)
    ]
    missing = [f"- {name}: {why}" for name, why in speeds.failures.items()]
    missing += [f"- {what}: time ran out" for what in dict.fromkeys(speeds.unmeasured)]
    parts = [
        "# A model of 8 B parameters, served",
        f"{speeds.machine}. Random weights; medians of tokens per second.",
        table(["tokens/s", *names], lines),
        "## Goals",
        table(["measure", "ours", "peer", "goal", "measured", "met"], goals),
        "## Not measured",
        "\n".join(missing) or "Nothing was left out.",
    ]
    return "\n\n".join(parts) + "\n"


def cell(speeds: Speeds, label: str, name: str) -> str:
    """Tokens per second, and how many times bf16's."""
    value, base = speeds.per_second(label, name), speeds.per_second(label, BF16)
    if value is None:
        return ""
    return f"{value:.1f}" + ("" if base is None else f" ({value / base:.2f}x)")


def ratio(speeds: Speeds, goal: Goal) -> float | None:
    """Ours over the peer's; None where one is missing."""
    ours = speeds.per_second(goal.measure, goal.ours)
    peer = speeds.per_second(goal.measure, goal.peer)
    return None if ours is None or peer is None else ours / peer
