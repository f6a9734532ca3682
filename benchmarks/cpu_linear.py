"""Speed of 4- and 8-bit linear layers on a CPU, next to bfloat16 and to other int4 kernels.

    python -m benchmarks.cpu_linear --rows 1,4,16,64,256,512 --json results.json

Every contender must first agree with the reference. Contenders then take turns; each turn runs
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

from benchmarks import peers
from benchmarks.machine import describe_machine
from benchmarks.peers import Linear
from quantkit_kernels.wna16 import QuantizedWeight, pack_weight, reference_linear, wna16_linear

SIZE, GROUP_SIZE, WEIGHTS = 4096, 128, 10
ROWS = (1, 2, 4, 8, 12, 16, 32, 64, 128, 256, 512)
ROUNDS = 11
FEW_ROWS = 16
"""Up to here a turn goes through all weights, above it through two."""

OURS, OURS_ASYMMETRIC, OURS_INT8 = "ours int4", "ours int4 asym", "ours int8"
BF16, ATEN, VLLM = "bf16", "ATen int4", "vLLM int4"
BYTES_PER_WEIGHT = {OURS: 0.5 + 4 / 128, OURS_ASYMMETRIC: 0.5 + 5 / 128, OURS_INT8: 1 + 4 / 128}

MAX_ERROR = {BF16: 4e-3, ATEN: 4e-3, VLLM: 6e-3}
"""Relative to the norm of y: weights, scales and y rounded to bfloat16."""
OUR_MAX_ERROR = 2e-3
"""The same with y alone rounded."""


@dataclass(frozen=True)
class Contender:
    """One implementation over several weights, with what the first weight means."""

    name: str
    layers: list[Linear]
    first: QuantizedWeight


@dataclass(frozen=True)
class Row:
    """Medians at one number of rows, in milliseconds per call."""

    rows: int
    milliseconds: dict[str, float]

    def speedup(self, name: str, over: str) -> float:
        """How many times faster `name` is than `over`."""
        return self.milliseconds[over] / self.milliseconds[name]

    @property
    def best_peer(self) -> str:
        """The faster of the other int4 kernels."""
        return min(self.milliseconds.keys() & {ATEN, VLLM}, key=self.milliseconds.__getitem__)


def random_weight(bits: int, symmetric: bool, seed: int) -> QuantizedWeight:
    """A 4096 x 4096 weight in groups of 128."""
    generator = torch.Generator().manual_seed(seed)
    shape, groups = (SIZE, SIZE), (SIZE, SIZE // GROUP_SIZE)
    zeros = torch.randint(0, 2**bits, groups, dtype=torch.uint8, generator=generator)
    return QuantizedWeight(
        codes=torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator),
        scales=torch.rand(groups, generator=generator) * 0.02 + 1e-3,
        zeros=torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros,
        group_index=(torch.arange(SIZE) // GROUP_SIZE).int(),
        bits=bits,
    )


def bf16_linear(weight: QuantizedWeight) -> Linear:
    """F.linear with the dequantised weight."""
    dense = weight.dequantize().bfloat16()
    return lambda x: torch.nn.functional.linear(x, dense)


def our_linear(weight: QuantizedWeight) -> Linear:
    """The op under test."""
    packed = pack_weight(weight, torch.bfloat16)
    return lambda x: wna16_linear(x, packed)


def contend(
    name: str, make: Callable[[QuantizedWeight], Linear], bits: int, symmetric: bool
) -> Contender:
    """The same kernel over `WEIGHTS` different weights."""
    weights = (random_weight(bits, symmetric, seed) for seed in range(WEIGHTS))
    layers = [make(weight) for weight in weights]
    return Contender(name, layers, random_weight(bits, symmetric, 0))


def contenders() -> list[Contender]:
    """All that can run here; says which cannot, and why."""
    found = [contend(BF16, bf16_linear, 4, True), contend(ATEN, peers.aten_int4, 4, True)]
    try:
        found.append(contend(VLLM, peers.vllm_int4, 4, True))
    except ImportError as error:
        print(f"vLLM is left out: {error}.")
    return [
        *found,
        contend(OURS, our_linear, 4, True),
        contend(OURS_ASYMMETRIC, our_linear, 4, False),
        contend(OURS_INT8, our_linear, 8, True),
    ]


def check(contender: Contender) -> float:
    """The relative error of the first layer, at several numbers of rows.

    Raises:
        ValueError: it is above the limit.
    """
    limit = MAX_ERROR.get(contender.name, OUR_MAX_ERROR)
    worst = 0.0
    for rows in (1, 13, 70):
        x = torch.randn(rows, SIZE).bfloat16()
        expected = reference_linear(x, contender.first)
        error = (contender.layers[0](x).float() - expected).norm() / expected.norm()
        worst = max(worst, float(error))
    if not worst <= limit:
        raise ValueError(f"{contender.name} is off by {worst:.1e} of y, more than {limit:.0e}")
    return worst


def measure(field: list[Contender], rows: int) -> Row:
    """Median milliseconds per call of each contender."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    x = torch.randn(rows, SIZE).bfloat16()
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


def table(results: list[Row]) -> str:
    """Milliseconds, then speed and ratios, as Markdown."""
    names = list(results[0].milliseconds)
    head = ["rows", *(f"{name}, ms" for name in names), "int4 GB/s", "int4 GFLOP/s"]
    head += ["int4 / bf16", "int4 / best int4 peer", "int8 / bf16"]
    has_vllm = VLLM in names
    head += ["int4 / vLLM int4"] if has_vllm else []
    lines = [head, ["---"] * len(head)]
    for row in results:
        seconds = row.milliseconds[OURS] / 1e3
        cells = [str(row.rows), *(f"{row.milliseconds[name]:.2f}" for name in names)]
        cells.append(f"{SIZE * SIZE * BYTES_PER_WEIGHT[OURS] / seconds / 1e9:.1f}")
        cells.append(f"{2 * row.rows * SIZE * SIZE / seconds / 1e9:.0f}")
        cells += [f"{row.speedup(OURS, over=peer):.2f}" for peer in (BF16, row.best_peer)]
        cells.append(f"{row.speedup(OURS_INT8, over=BF16):.2f}")
        cells += [f"{row.speedup(OURS, over=VLLM):.2f}"] if has_vllm else []
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of x, by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    field = contenders()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    errors = {contender.name: check(contender) for contender in field}
    print(f"{describe_machine()}. {SIZE} x {SIZE}, groups of {GROUP_SIZE}, bfloat16 activations.")
    print("Relative error: " + ", ".join(f"{name} {e:.1e}" for name, e in errors.items()) + ".")
    results = [measure(field, int(rows)) for rows in options.rows.split(",")]
    print(table(results))
    if options.json:
        record = {
            "machine": describe_machine(),
            "shape": [SIZE, SIZE],
            "group_size": GROUP_SIZE,
            "clock": "CPU time of the thread" if options.threads == 1 else "wall time",
            "relative_error": errors,
            "results": [asdict(row) for row in results],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
