"""Decode and prefill speed of a 0.7 B model in several schemes, in real engines, interleaved.

Correctness first: every engine's perplexity on the same text must equal bf16's within 1 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.machine import describe_machine
from benchmarks.random_model import config_0_7b, make_pair
from vllm_quantkit.engine import Engine, EngineSpec

CACHE = Path(".cache/bench")
HELD_OUT = Path("examples/tiny-lm/data/held_out.txt")
GATE_TOKENS = 1024
GATE = 0.01

BF16, VLLM_AWQ, AWQ, SMOOTHQUANT = "bf16", "vLLM AWQ", "quantkit-awq", "quantkit-smoothquant"
GOALS = (
    ("decode, 1 sequence", AWQ, BF16, 2.3),
    ("decode, 1 sequence", AWQ, VLLM_AWQ, 1.8),
    ("decode, 1 sequence", SMOOTHQUANT, BF16, 1.6),
    ("prefill", SMOOTHQUANT, BF16, 1.5),
)
"""Measure, ours, peer, and how many times faster ours is to be."""

Speeds = dict[str, dict[str, float]]
"""Measure to engine to tokens per second."""


def main() -> int:
    """Measure and print; 1 where the correctness gate failed."""
    args = _parse_arguments()
    with ExitStack() as stack:
        engines = {
            label: stack.enter_context(Engine(spec, CACHE / f"{label.replace(' ', '-')}.log"))
            for label, spec in _specs(args).items()
        }
        if not passes_gate(engines):
            return 1
        speeds = {
            **{_decode_label(n): time_decode(engines, n, args) for n in args.batches},
            "prefill": time_prefill(engines, args),
        }
    report(speeds)
    if args.json:
        result = {"machine": describe_machine(), "tokens_per_second": speeds}
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32, help="decoded by each sequence")
    parser.add_argument("--prefill", type=int, default=448, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--only", nargs="+", default=[BF16, VLLM_AWQ, AWQ, SMOOTHQUANT])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _specs(args: argparse.Namespace) -> dict[str, EngineSpec]:
    original, quantized = make_pair(config_0_7b(), CACHE / "llama-0.7b")
    ways = {
        BF16: EngineSpec(str(original)),
        VLLM_AWQ: EngineSpec(str(quantized), "awq"),
        AWQ: EngineSpec(str(quantized), AWQ),
        SMOOTHQUANT: EngineSpec(str(original), SMOOTHQUANT),
    }
    options = (("enforce_eager", True),) if args.eager else ()
    return {label: replace(ways[label], options=options) for label in args.only}


def passes_gate(engines: Mapping[str, Engine]) -> bool:
    """True where all engines compute the same perplexity."""
    text = HELD_OUT.read_text()
    found = {label: e.perplexity(text, GATE_TOKENS)[0] for label, e in engines.items()}
    worst = max(abs(value / found[BF16] - 1) for value in found.values())
    print(f"perplexity {found}: largest difference {worst:.2%}, allowed {GATE:.0%}", flush=True)
    return worst <= GATE


def time_decode(
    engines: Mapping[str, Engine], batch: int, args: argparse.Namespace
) -> dict[str, float]:
    """Median tokens/s of `batch` sequences together."""
    return _median(engines, args.rounds, lambda engine: engine.decode_speed(batch, args.tokens))


def time_prefill(engines: Mapping[str, Engine], args: argparse.Namespace) -> dict[str, float]:
    """Median tokens/s of prompts that no cache holds."""
    return _median(engines, args.rounds, lambda engine: engine.prefill_speed(args.prefill))


def _median(
    engines: Mapping[str, Engine], rounds: int, measure: Callable[[Engine], float]
) -> dict[str, float]:
    measured = [{label: measure(e) for label, e in engines.items()} for _ in range(rounds)]
    return {label: median(row[label] for row in measured) for label in engines}


def _decode_label(batch: int) -> str:
    return "decode, 1 sequence" if batch == 1 else f"decode, {batch} sequences"


def report(speeds: Speeds) -> None:
    """A Markdown table, and what became of the goals."""
    labels = list(next(iter(speeds.values())))
    print(f"\n{describe_machine()}\n")
    print("| tokens/s | " + " | ".join(labels) + " |")
    print("|---" * (len(labels) + 1) + "|")
    for measure, row in speeds.items():
        cells = (f"{row[name]:.1f} ({row[name] / row[BF16]:.2f}x)" for name in labels)
        print(f"| {measure} | " + " | ".join(cells) + " |")
    print()
    for measure, ours, peer, goal in GOALS:
        if measure in speeds and {ours, peer} <= speeds[measure].keys():
            ratio = speeds[measure][ours] / speeds[measure][peer]
            print(f"{measure}: {ours} is {ratio:.2f}x {peer}, goal {goal}x.")


if __name__ == "__main__":
    sys.exit(main())
