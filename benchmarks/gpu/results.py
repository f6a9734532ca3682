"""What was measured, and its file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.gate import Verdict


@dataclass(frozen=True)
class Ceilings:
    """What the GPU does at best, measured in the same run.

    Attributes:
        copy: bytes per second, read and written, of a copy from memory to memory.
        product: operations per second of a large product of bfloat16 matrices.
    """

    copy: float
    product: float

    def least_ms(self, nbytes: float, operations: float) -> float:
        """No call that moves and computes as much takes fewer milliseconds."""
        return 1e3 * max(nbytes / self.copy, operations / self.product)


@dataclass(frozen=True)
class Row:
    """One contender at one number of tokens.

    Attributes:
        problem, op, kind, contender: names.
        m, n, k: tokens, channels out and in.
        ms, low, high: median and quartiles of the milliseconds per call.
        nbytes: the least bytes it moves.
        operations: multiplications and additions.
        copies: of the data, between which calls rotate.
        graph: whether it was timed as a CUDA graph.
    """

    problem: str
    op: str
    kind: str
    contender: str
    m: int
    n: int
    k: int
    ms: float
    low: float
    high: float
    nbytes: float
    operations: float
    copies: int
    graph: bool

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return 1e3 * self.nbytes / self.ms

    @property
    def rate(self) -> float:
        """Operations per second."""
        return 1e3 * self.operations / self.ms


@dataclass
class Results:
    """Everything measured, and where.

    Attributes:
        machine: GPU and versions.
        ceilings: of the machine.
        rows: measurements.
        verdicts: of the correctness gate.
        unmeasured: problem to the numbers of tokens for which time ran out.
        failures: what went wrong after the gate, as sentences.
    """

    machine: str
    ceilings: Ceilings
    rows: list[Row] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    unmeasured: dict[str, list[int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def milliseconds(self, op: str, contender: str) -> dict[tuple[str, int], float]:
        """(problem, tokens) to the median."""
        wanted = (op, contender)
        return {(r.problem, r.m): r.ms for r in self.rows if (r.op, r.contender) == wanted}

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read the file."""
        content: dict[str, Any] = json.loads(path.read_text())
        return cls(
            content["machine"],
            Ceilings(**content["ceilings"]),
            [Row(**row) for row in content["rows"]],
            [Verdict(**verdict) for verdict in content["verdicts"]],
            content["unmeasured"],
            content["failures"],
        )
