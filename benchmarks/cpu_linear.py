"""Speed of quantised linear layers on a CPU, next to bfloat16 and to other people's kernels.

    python -m benchmarks.cpu_linear --rows 1,4,16,64,256,512 --json results.json

Every contender must first agree with its reference. Contenders then take turns; each turn runs
through different weights, so that weights come from memory as they do in a model. With one thread
the clock is the thread's CPU time, which other processes on the machine disturb least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.linear_contenders import (
    ATEN,
    BF16,
    FP8,
    FP8_BLOCK,
    GROUP_SIZE,
    INT4,
    INT4_ASYMMETRIC,
    LLM_INT8,
    NF4,
    SIZE,
    VLLM,
    VLLM_W8A8,
    W8A8,
    W8A16,
    WEIGHTS,
    Contender,
    check,
    contenders,
    random_inputs,
)
from benchmarks.peers import Linear
from vllm_quantkit.hardware.machine import describe_machine

ROWS = (1, 2, 4, 8, 12, 16, 32, 64, 128, 256, 512)
ROUNDS = 11
FEW_ROWS = 16
"""Up to here a turn goes through all weights, above it through two."""

TABLES = {
    "4-bit weights, 16-bit activations": (INT4, INT4_ASYMMETRIC, NF4, ATEN, VLLM),
    "8-bit weights; activations in 8 bits, quantised by each call, but for W8A16": (
        W8A8, VLLM_W8A8, LLM_INT8, FP8, FP8_BLOCK, W8A16,
    ),
}  # fmt: skip
"""Title to the contenders in each table."""

BYTES_PER_WEIGHT = {
    INT4: 0.5 + 4 / GROUP_SIZE,
    INT4_ASYMMETRIC: 0.5 + 5 / GROUP_SIZE,
    NF4: 0.5 + 4 / GROUP_SIZE,
    W8A16: 1 + 4 / GROUP_SIZE,
    FP8_BLOCK: 1 + 4 / GROUP_SIZE,
    W8A8: 1 + 8 / SIZE,
    FP8: 1 + 4 / SIZE,
}


@dataclass(frozen=True)
class Row:
    """Medians at one number of rows, in milliseconds per call."""

    rows: int
    milliseconds: dict[str, float]

    def speedup(self, name: str) -> float:
        """How many times faster than bfloat16."""
        return self.milliseconds[BF16] / self.milliseconds[name]

    def gigabytes_per_second(self, name: str) -> float:
        """Weights and scales read."""
        return SIZE * SIZE * BYTES_PER_WEIGHT[name] / self.milliseconds[name] / 1e6

    def gigaflops(self, name: str) -> float:
        """Multiplications and additions, in 10**9 a second."""
        return 2 * self.rows * SIZE * SIZE / self.milliseconds[name] / 1e6


def measure(field: list[Contender], rows: int) -> Row:
    """Median milliseconds per call of each contender."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    x = random_inputs(rows)
    calls = WEIGHTS if rows <= FEW_ROWS else 2
    taken: dict[str, list[float]] = {contender.name: [] for contender in field}
    for turn in range(ROUNDS):
        for contender in field[turn % len(field) :] + field[: turn % len(field)]:
            layers = [contender.layers[(turn * calls + i) % WEIGHTS] for i in range(calls)]
            taken[contender.name].append(_time(layers, x, clock) / calls)
    return Row(rows, {name: 1e3 * statistics.median(times) for name, times in taken.items()})


def _time(layers: list[Linear], x: Tensor, clock: Callable[[], float]) -> float:
    start = clock()
    for layer in layers:
        layer(x)
    return clock() - start


def table(results: list[Row], names: tuple[str, ...]) -> str:
    """Milliseconds and speed-ups over bfloat16, then rates of the first name, as Markdown."""
    present = [name for name in names if name in results[0].milliseconds]
    head = ["rows", "bf16, ms", *(f"{name}, ms" for name in present)]
    head += [f"{name} / bf16" for name in present]
    rated = [name for name in present if name in BYTES_PER_WEIGHT][:1]
    head += [f"{name} {unit}" for name in rated for unit in ("GB/s", "GFLOP/s")]
    lines = [head, ["---"] * len(head)]
    for row in results:
        cells = [str(row.rows)]
        cells += [f"{row.milliseconds[name]:.2f}" for name in (BF16, *present)]
        cells += [f"{row.speedup(name):.2f}" for name in present]
        for name in rated:
            cells += [f"{row.gigabytes_per_second(name):.1f}", f"{row.gigaflops(name):.0f}"]
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def record(results: list[Row], errors: dict[str, float], threads: int) -> dict[str, object]:
    """Everything that was measured, and where."""
    return {
        "machine": describe_machine(),
        "shape": [SIZE, SIZE],
        "group_size": GROUP_SIZE,
        "clock": "CPU time of the thread" if threads == 1 else "wall time",
        "relative_error": errors,
        "results": [asdict(row) for row in results],
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of x, by commas")
    parser.add_argument("--only", default="", help="names of contenders, by commas; bf16 is added")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    field = contenders([BF16, *options.only.split(",")] if options.only else [])
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    errors = {contender.name: check(contender) for contender in field}
    print(f"{describe_machine()}. {SIZE} x {SIZE}, groups of {GROUP_SIZE}, bfloat16 activations.")
    print("Relative error: " + ", ".join(f"{name} {e:.1e}" for name, e in errors.items()) + ".")
    results = [measure(field, int(rows)) for rows in options.rows.split(",")]
    for title, names in TABLES.items():
        if any(name in errors for name in names):
            print(f"\n{title}:\n\n{table(results, names)}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        numbers = record(results, errors, options.threads)
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
