"""Attention over a KV cache of 4 bits on a CPU, next to vLLM's own over 16 and 8 bits.

    python -m benchmarks.kv_decode --json benchmarks/results/kv_decode_cpu.json

Every kernel must first agree with attention in float32. Contenders then take turns; each turn runs
through the caches of as many layers as a model has, up to a limit, so that they come from memory.
Calls are those of an engine: ours check their arguments, rotate queries and results. With one
thread the clock is the thread's CPU time, which other processes on the machine disturb least.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.kv_decode_contenders import (
    BF16,
    DTYPE,
    EAGER,
    FP8,
    HEAD_SIZE,
    HEADS,
    INT4,
    KV_HEADS,
    LAYOUT,
    Cache,
    check,
    make_batch,
    random_cache,
)
from vllm_quantkit.hardware.machine import describe_machine

CONTEXTS, BATCHES, THREADS = "1024,2048,8192,32768", "1,8", "1,2"
ROUNDS = 11
MAX_LAYERS, LAYERS_BYTES = 32, 128 << 20
"""Layers whose caches a turn goes through, and most bytes of those of 16 bits."""

EAGER_TOKENS = 1 << 15
"""Most tokens of a batch that eager PyTorch, which takes a hundred times longer, is timed with."""

PROMPT = 2048
WRITE, PREFILL, BOTH = "int4 write", "vLLM bf16 prefill", "the same, and int4 write"

TOKEN_BYTES = {
    INT4: KV_HEADS * LAYOUT.token_bytes,
    BF16: 4 * KV_HEADS * HEAD_SIZE,
    FP8: 2 * KV_HEADS * HEAD_SIZE,
}
"""Bytes of a token in one layer."""

Contender = list[Callable[[], None]]
"""What is called for each layer."""


@dataclass(frozen=True)
class Row:
    """Medians in milliseconds per call, over one layer."""

    batch: int
    context: int
    milliseconds: dict[str, float]


def decode_row(batch: int, context: int) -> Row:
    """One query a request."""
    names = [INT4, BF16, FP8] + ([EAGER] if batch * context <= EAGER_TOKENS else [])
    size = batch * context * TOKEN_BYTES[BF16]
    layers = max(1, min(MAX_LAYERS, LAYERS_BYTES // size))
    query = torch.randn(batch, HEADS, HEAD_SIZE, dtype=DTYPE)
    out, step = torch.empty_like(query), make_batch(batch, context)

    def call(cache: Cache) -> Callable[[], None]:
        return lambda: cache.attend(query, out)

    field = {
        name: [call(random_cache(name, step)) for _ in range(1 if name == EAGER else layers)]
        for name in names
    }
    return Row(batch, context, measure(field))


def prefill_row() -> Row:
    """A prompt in one step: vLLM's write and attention, and our write."""
    step = make_batch(1, PROMPT, PROMPT)
    ours, theirs = random_cache(INT4, step), random_cache(BF16, step)
    query = torch.randn(PROMPT, HEADS, HEAD_SIZE, dtype=DTYPE)
    key, value = torch.randn(2, PROMPT, KV_HEADS, HEAD_SIZE, dtype=DTYPE)
    out, slots = torch.empty_like(query), torch.arange(PROMPT)

    def prefill() -> None:
        theirs.write(key, value, slots)
        theirs.attend(query, out)

    def write() -> None:
        ours.write(key, value, slots)

    def both() -> None:
        write()
        prefill()

    return Row(1, PROMPT, measure({WRITE: [write], PREFILL: [prefill], BOTH: [both]}))


def measure(field: dict[str, Contender]) -> dict[str, float]:
    """Median milliseconds per call of each contender."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in field}
    for calls in field.values():
        calls[0]()
    names = list(field)
    for turn in range(ROUNDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name != EAGER or turn < 3:
                taken[name].append(_time(field[name], clock))
    return {name: 1e3 * statistics.median(times) for name, times in taken.items()}


def _time(calls: Contender, clock: Callable[[], float]) -> float:
    start = clock()
    for call in calls:
        call()
    return (clock() - start) / len(calls)


def table(threads: int, rows: list[Row]) -> str:
    """Milliseconds, quotients and rates, as Markdown."""
    head = ["threads", "batch", "context", *(f"{n}, ms" for n in (INT4, BF16, FP8, EAGER))]
    head += [f"{INT4} / {BF16}", f"{INT4} / {FP8}", f"{EAGER} / {INT4}", f"{INT4} GB/s"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        found = row.milliseconds
        cells = [str(number) for number in (threads, row.batch, row.context)]
        cells += [f"{found[n]:.3f}" if n in found else "" for n in (INT4, BF16, FP8, EAGER)]
        cells += [f"{found[INT4] / found[n]:.2f}" for n in (BF16, FP8)]
        cells.append(f"{found[EAGER] / found[INT4]:.0f}" if EAGER in found else "")
        size = row.batch * row.context * TOKEN_BYTES[INT4]
        lines.append([*cells, f"{size / found[INT4] / 1e6:.1f}"])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def measured(contexts: str, batches: str, threads: int) -> dict[str, Any]:
    """Everything, with the threads of this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    errors = check()
    print(f"{describe_machine()}. {HEADS} heads, {KV_HEADS} KV heads, {HEAD_SIZE} dimensions.")
    print("Relative error: " + ", ".join(f"{name} {e:.1e}" for name, e in errors.items()) + ".")
    prompt = prefill_row()
    found = prompt.milliseconds
    print(", ".join(f"{name} {ms:.2f} ms" for name, ms in found.items()), end="; ")
    print(f"{PROMPT} tokens, {found[BOTH] / found[PREFILL]:.3f} times the prefill's.")
    pairs = [(int(b), int(c)) for b in batches.split(",") for c in contexts.split(",")]
    rows = [decode_row(*pair) for pair in pairs]
    print(f"\n{table(threads, rows)}\n", flush=True)
    return {
        "machine": describe_machine(),
        "threads": threads,
        "clock": "CPU time of the thread" if threads == 1 else "wall time",
        "relative_error": errors,
        "prefill": asdict(prompt),
        "decode": [asdict(row) for row in rows],
    }


def main() -> None:
    """Entry point: a process for each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default=CONTEXTS, help="tokens of a request, by commas")
    parser.add_argument("--batches", default=BATCHES, help="requests, by commas")
    parser.add_argument("--threads", default=THREADS, help="numbers of threads, by commas")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    results = []
    if "," not in options.threads:
        results = [measured(options.contexts, options.batches, int(options.threads))]
    else:
        results = [_in_a_process(threads) for threads in options.threads.split(",")]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        shape = {"heads": HEADS, "kv_heads": KV_HEADS, "head_size": HEAD_SIZE}
        options.json.write_text(json.dumps({"shape": shape, "results": results}, indent=1) + "\n")


def _in_a_process(threads: str) -> dict[str, Any]:
    """Run this command with so many threads: OpenMP reads their number when it starts."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        # The last of two equal options holds.
        extra = ["--threads", threads, "--json", str(path)]
        command = [sys.executable, "-m", "benchmarks.kv_decode", *sys.argv[1:], *extra]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads})
        result: dict[str, Any] = json.loads(path.read_text())["results"][0]
        return result


if __name__ == "__main__":
    main()
