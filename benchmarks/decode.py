"""Decode tokens/s of a 0.7 B model: bf16, vLLM's own AWQ and quantkit-awq, interleaved.

Correctness first: the quantised engines' perplexity on the same text must equal bf16's within 1 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from benchmarks.engine import Engine, EngineSpec
from benchmarks.machine import describe_machine
from benchmarks.random_model import config_0_7b, make_pair

CACHE = Path(".cache/bench")
HELD_OUT = Path("examples/tiny-lm/data/held_out.txt")
GATE_TOKENS = 1024
GATE = 0.01
GOALS = {"bf16": 2.3, "vLLM AWQ": 1.8}


def main() -> int:
    """Measure and print; 1 where the correctness gate failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    original, quantized = make_pair(config_0_7b(), CACHE / "llama-0.7b")
    ways = {
        "bf16": EngineSpec(str(original)),
        "vLLM AWQ": EngineSpec(str(quantized), "awq"),
        "quantkit-awq": EngineSpec(str(quantized), "quantkit-awq"),
    }
    options = (("enforce_eager", True),) if args.eager else ()
    with ExitStack() as stack:
        engines = {
            label: stack.enter_context(
                Engine(
                    EngineSpec(spec.model, spec.quantization, options=options),
                    CACHE / f"{label.replace(' ', '-')}.log",
                )
            )
            for label, spec in ways.items()
        }
        if not passes_gate(engines):
            return 1
        speeds = {batch: time_decode(engines, batch, args) for batch in args.batches}
    report(speeds)
    if args.json:
        result = {"machine": describe_machine(), "tokens_per_second": speeds}
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def passes_gate(engines: dict[str, Engine]) -> bool:
    """True where all engines compute the same perplexity."""
    text = HELD_OUT.read_text()
    found = {label: e.perplexity(text, GATE_TOKENS)[0] for label, e in engines.items()}
    worst = max(abs(value / found["bf16"] - 1) for value in found.values())
    print(f"perplexity {found}: largest difference {worst:.2%}, allowed {GATE:.0%}", flush=True)
    return worst <= GATE


def time_decode(
    engines: dict[str, Engine], batch: int, args: argparse.Namespace
) -> dict[str, float]:
    """Median tokens/s of each engine over interleaved rounds."""
    rounds = [
        {label: e.decode_speed(batch, args.tokens) for label, e in engines.items()}
        for _ in range(args.rounds)
    ]
    return {label: median(r[label] for r in rounds) for label in engines}


def report(speeds: dict[int, dict[str, float]]) -> None:
    """A Markdown table with the ratios that are the goals."""
    print(f"\n{describe_machine()}\n")
    print("| batch | bf16 | vLLM AWQ | quantkit-awq | over bf16 | over vLLM AWQ |")
    print("|---|---|---|---|---|---|")
    for batch, s in speeds.items():
        ours = s["quantkit-awq"]
        ratios = " | ".join(f"{ours / s[peer]:.2f}x" for peer in GOALS)
        values = " | ".join(f"{s[label]:.1f} tok/s" for label in s)
        print(f"| {batch} | {values} | {ratios} |")
    print(f"\nGoals at batch 1: {GOALS['bf16']}x over bf16, {GOALS['vLLM AWQ']}x over vLLM AWQ.")


if __name__ == "__main__":
    sys.exit(main())
