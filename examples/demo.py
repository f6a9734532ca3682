"""Serve a quantised model with `vllm serve`, ask it, and measure what quantisation cost.

`make demo` runs it on the model in examples/tiny-lm; `make demo MODEL=Qwen/Qwen3-0.6B` downloads
a model, quantises it to 4 bits (once), and does the same.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from examples.demo_models import CALIBRATION, DemoModels, prepare
from examples.demo_server import Server, ServerError
from vllm_quantkit.bench.plan import BenchPlan
from vllm_quantkit.bench.speeds import measure_speeds
from vllm_quantkit.engine import Engine, EngineError, EngineSpec
from vllm_quantkit.terminal import Terminal

LOGS = Path(".cache/demo")
HELD_OUT = Path("examples/tiny-lm/data/held_out.txt")
MAX_MODEL_LEN = 512
SCORED_TOKENS = 8192
PLAN = BenchPlan(batches=(1,), tokens=96, prompts=(), load=0, mixed=0, rounds=3)
GPU_SHARE = 0.2
"""Of the GPU's memory for each engine; four are alive at once so that timings interleave."""

INT4_CACHE = {"quantkit": {"kv_cache": {"dtype": "int4", "prefill": "cached"}}}
"""`cached`, so that the perplexity is that of keys and values of 4 bits; see the README."""


class Way(NamedTuple):
    """One way to serve the model: the folder, the flag, bytes of weights and further options."""

    folder: str
    method: str | None
    weights: int
    options: tuple[tuple[str, object], ...] = ()


class Row(NamedTuple):
    """What was measured of it."""

    label: str
    weights: int
    cache_tokens: int
    perplexity: float
    speed: float


def main() -> int:
    """Run the demo; 0 where every part worked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="examples/tiny-lm", help="folder or hub name")
    model = parser.parse_args().model
    try:
        models = prepare(model, progress=say)
        ask_server(models)
        print_table(measure(models))
    except (EngineError, ServerError, OSError, ValueError) as error:
        say(f"FAILED: {error}")
        return 1
    except KeyboardInterrupt:
        say("Stopped.")
        return 130
    names = {"original": models.original, "quantized": models.quantized}
    print(NEXT_STEPS.format(**names, calibration=CALIBRATION))
    return 0


def ask_server(models: DemoModels) -> None:
    """Start `vllm serve`, wait until it is healthy, ask for a chat and a completion."""
    say(f"Starting: vllm serve {models.quantized} --quantization quantkit-awq")
    with Server(models.quantized, "quantkit-awq", MAX_MODEL_LEN, LOGS / "serve.log", say) as server:
        for title, text in server.ask():
            print(f"\n  {title}\n    {text.strip()}\n")
    say("The server has stopped.")


def measure(models: DemoModels) -> list[Row]:
    """Size, held-out perplexity and decode speed of each way to serve the model."""
    int4_cache = (("additional_config", INT4_CACHE),)
    awq = models.quantized, "quantkit-awq", models.quantized_bytes
    ways = {
        "16-bit": Way(models.original, None, models.original_bytes),
        "vLLM's own AWQ": Way(models.quantized, "awq", models.quantized_bytes),
        "quantkit-awq": Way(*awq),
        "with an INT4 cache": Way(*awq, int4_cache),
    }
    text = HELD_OUT.read_text()
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for i, (label, way) in enumerate(ways.items(), start=1):
            say(f"Measuring {i}/{len(ways)}: starting an engine for {label} ...")
            options = (*gpu_options(), *way.options)
            spec = EngineSpec(way.folder, way.method, MAX_MODEL_LEN, options)
            engines[label] = stack.enter_context(Engine(spec, LOGS / f"engine-{i}.log"))
        perplexity = {label: e.perplexity(text, SCORED_TOKENS)[0] for label, e in engines.items()}
        tokens = {label: e.cache_tokens() for label, e in engines.items()}
        say(f"Timing decode, {PLAN.rounds} interleaved rounds ...")
        found = measure_speeds(engines, PLAN, Terminal(quiet=True))
    if found.failures:
        raise EngineError("; ".join(f"{label}: {why}" for label, why in found.failures.items()))
    speeds = {label: speed.decode[1].median for label, speed in found.speeds.items()}
    return [
        Row(label, way.weights, tokens[label], perplexity[label], speeds[label])
        for label, way in ways.items()
    ]


def gpu_options() -> tuple[tuple[str, object], ...]:
    """A share of the GPU for each engine; nothing on a CPU."""
    import torch

    return (("gpu_memory_utilization", GPU_SHARE),) if torch.cuda.is_available() else ()


def print_table(rows: list[Row]) -> None:
    """The measured table, and what it does not show."""
    base = rows[0].cache_tokens
    print(f"\n  {'':<20}{'weights':>12}{'KV cache':>14}{'perplexity':>14}{'decode':>16}")
    for row in rows:
        size, tokens = row.weights / 2**20, row.cache_tokens / base
        print(
            f"  {row.label:<20}{size:>8.1f} MiB{tokens:>7.2f}x tokens"
            f"{row.perplexity:>14.3f}{row.speed:>10.1f} tok/s"
        )
    print(f"\n  Held-out text, {SCORED_TOKENS} tokens at most; greedy decode of one sequence.")
    if rows[0].weights < 100 * 2**20:
        print("  A model this small spends its time outside the weights: `make bench-serving`")
        print("  shows decode speed on 0.7 B parameters.")


def say(text: str) -> None:
    """Progress, one line."""
    print(f"\033[1m[demo]\033[0m {text}", flush=True)


NEXT_STEPS = """
  What to try next
    .venv/bin/vllm serve {quantized} --quantization quantkit-awq     serve it yourself
    .venv/bin/quantkit eval {quantized}                              what 4 bits cost
    .venv/bin/quantkit compare {original} --quick --calibration {calibration}
                                                                     every scheme, measured
    make demo MODEL=Qwen/Qwen3-0.6B                                  the same with a hub model
    .venv/bin/python -m examples.int4_kv --out .cache/int4-kv        4-bit weights and cache
    make bench-cpu                                                   kernels against ATen and vLLM
    make test                                                        everything that must hold
"""

if __name__ == "__main__":
    sys.exit(main())
