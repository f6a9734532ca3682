"""Decode and prefill speed of a 0.7 B model in several schemes, in real engines, interleaved.

Correctness first: every engine's perplexity on the same text must equal bf16's within 1 %. It is
`quantkit bench` on a model of random weights, with goals.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.random_model import config_0_7b, make_pair
from vllm_quantkit.bench.gate import Gate
from vllm_quantkit.bench.noise import load_average
from vllm_quantkit.bench.offline import OfflineBench
from vllm_quantkit.bench.plan import BenchPlan
from vllm_quantkit.bench.quantities import Key
from vllm_quantkit.bench.results import BenchResult
from vllm_quantkit.bench.samples import Sample, speed_up
from vllm_quantkit.bench.tables import doubts, result_table, sentences
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.terminal import Terminal, to_json

CACHE = Path(".cache/bench")
HELD_OUT = Path("examples/tiny-lm/data/held_out.txt")
GATE = 0.01
PREFILL = 448

BF16, VLLM_AWQ, AWQ, SMOOTHQUANT = "bf16", "vLLM AWQ", "quantkit-awq", "quantkit-smoothquant"
ONE, PROMPT = Key("decode", 1), Key("prefill", PREFILL)
GOALS = (
    (ONE, AWQ, BF16, 2.3),
    (ONE, AWQ, VLLM_AWQ, 1.8),
    (ONE, SMOOTHQUANT, BF16, 1.6),
    (PROMPT, SMOOTHQUANT, BF16, 1.5),
)
"""Measure, ours, peer, and how many times faster ours is to be."""


def main() -> int:
    """Measure and print; 1 where an engine failed or computes something else."""
    args = _parse_arguments()
    plan = BenchPlan(
        batches=tuple(args.batches),
        tokens=args.tokens,
        prompts=(args.prefill,),
        load=0,
        mixed=0,
        rounds=args.rounds,
    )
    load = load_average()
    gate = Gate(text=HELD_OUT.read_text(), tolerance=GATE)
    bench = OfflineBench(_specs(args, plan), plan, gate, CACHE, Terminal())
    bench.run_together()
    result = bench.result(load)
    report(result)
    if args.json:
        args.json.write_text(to_json(result))
    return int(bool(bench.rounds.failures))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32, help="decoded by each sequence")
    parser.add_argument("--prefill", type=int, default=PREFILL, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--only", nargs="+", default=[BF16, VLLM_AWQ, AWQ, SMOOTHQUANT])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _specs(args: argparse.Namespace, plan: BenchPlan) -> dict[str, EngineSpec]:
    original, quantized = make_pair(config_0_7b(), CACHE / "llama-0.7b")
    ways = {
        BF16: EngineSpec(str(original)),
        VLLM_AWQ: EngineSpec(str(quantized), "awq"),
        AWQ: EngineSpec(str(quantized), AWQ),
        SMOOTHQUANT: EngineSpec(str(original), SMOOTHQUANT),
    }
    eager = (("enforce_eager", True),) if args.eager else ()
    options = (("max_num_seqs", plan.most_sequences), *eager)
    return {
        label: replace(ways[label], max_model_len=plan.longest, options=options)
        for label in args.only
    }


def report(result: BenchResult) -> None:
    """A Markdown table, what noise hides, and what became of the goals."""
    print(f"\n{result_table(result).markdown()}\n")
    for text in (*sentences(result), *doubts(result)):
        print(text)
    print()
    for key, ours, peer, goal in GOALS:
        found, reference = _sample(result, ours, key), _sample(result, peer, key)
        if found is not None and reference is not None:
            ratio = speed_up(found, reference, "higher")
            print(
                f"{key.quantity} {key.at}: {ours} is {ratio.median:.2f}x {peer} "
                f"({ratio.low:.2f} to {ratio.high:.2f}), goal {goal}x."
            )


def _sample(result: BenchResult, label: str, key: Key) -> Sample | None:
    """What an engine did; None where it was not measured."""
    row = next((row for row in result.measured if row.label == label), None)
    entry = None if row is None else row.entry(key)
    return None if entry is None else entry.sample


if __name__ == "__main__":
    sys.exit(main())
