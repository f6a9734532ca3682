"""What `make table` runs: `quantkit compare` on the demo model, and the speeds of a 0.7 B one.

    python -m benchmarks.trade_off demo 0.7b

The larger model has random weights: it is as fast as a trained one, and its quality says nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.random_model import config_0_7b, make_pair
from vllm_quantkit.compare.commands import run_compare
from vllm_quantkit.compare.request import read_request
from vllm_quantkit.terminal import Terminal

RESULTS = Path("benchmarks/results")
DATA = Path("examples/tiny-lm/data")
RANDOM = Path(".cache/bench/llama-0.7b")
WORK = Path(".cache/bench/compare")


def main() -> int:
    """Measure what was asked for and is not there yet; 1 where a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    args = parser.parse_args()
    terminal = Terminal()
    status = 0
    for name in args.models:
        begin = time.perf_counter()
        places = {"out": RESULTS, "work": WORK / name}
        request = read_request({**MODELS[name](), **places, "fresh": args.fresh})
        status |= run_compare(request, terminal, f"trade_off_{name}")
        terminal.note(f"{name}: {(time.perf_counter() - begin) / 60:.1f} minutes")
    return status


def demo() -> dict[str, Any]:
    """The whole table; the calibration text has 256 samples of a quarter of the model's length."""
    return {
        "model": "examples/tiny-lm/bf16",
        "source": str(DATA / "calibration.txt"),
        "length": 256,
        "held_out": 8,
        "text": str(DATA / "held_out.txt"),
        "windows": 42,
        "batches": "1,8",
        "rounds": 6,
    }


def random_0_7b() -> dict[str, Any]:
    """Speeds and memory alone; weights are quantised at load, or were drawn as AWQ."""
    original, awq = make_pair(config_0_7b(), RANDOM)
    rows = (
        "quantkit-fp8",
        "quantkit-smoothquant",
        "quantkit-int8",
        "quantkit-int4",
        f"INT4 AWQ={awq}",
        f"INT4 AWQ={awq}+kv4",
    )
    return {
        "model": str(original),
        "rows": ",".join(rows),
        "quality": False,
        "source": str(DATA / "calibration.txt"),
        "samples": 16,
        "length": 512,
        "allow_few_samples": True,
        "held_out": 2,
        "batches": "1,8,32",
        "tokens": 16,
        "rounds": 5,
    }


MODELS = {"demo": demo, "0.7b": random_0_7b}
"""Name of the files to the options of `quantkit compare`."""

if __name__ == "__main__":
    sys.exit(main())
