"""4-bit weights with a 4-bit KV cache: calibrate the cache, serve both, see what they cost.

    python -m examples.int4_kv --out .cache/int4-kv
    python -m examples.int4_kv --out .cache/int4-kv --tensor-parallel-size 2

The demo model's AWQ weights stay as they are; the cache is calibrated on the 16-bit model, whose
keys are what the cache has to hold.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_quantkit.engine import Engine, EngineError, EngineSpec

DEMO = Path("examples/tiny-lm")
HELD_OUT = DEMO / "data/held_out.txt"
TEXT = ("--calibration", str(DEMO / "data/calibration.txt"), "--length", "512")
FEW = ("--samples", "64", "--allow-few-samples")
MAX_MODEL_LEN = 1024
SCORED_TOKENS = 4096
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 512, 48


def main() -> int:
    """Run the example; 0 where everything worked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for calibration and logs")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    args = parser.parse_args()
    calibration = args.out / "kv_cache"
    if not calibration.exists() and not calibrate(calibration):
        return 1
    int4 = {"dtype": "int4", "calibration": str(calibration)}
    # What calibration is worth shows when every key is read from the cache.
    exact = {**int4, "prefill": "cached"}
    try:
        rows = {
            "16 bits": measure("16-bit", args, {}),
            "INT4": measure("int4", args, {"quantkit": {"kv_cache": exact}}),
        }
    except EngineError as error:
        print(f"FAILED: {error}", flush=True)
        return 1
    report(rows)
    return 0


def calibrate(out: Path) -> bool:
    """`quantkit calibrate-kv` on the 16-bit model; True where it worked."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "vllm_quantkit.cli", "calibrate-kv", str(DEMO / "bf16")]
    done = subprocess.run([*command, *TEXT, *FEW, "--out", str(out)], check=False)
    return done.returncode == 0


def measure(name: str, args: argparse.Namespace, additional: dict[str, Any]) -> dict[str, Any]:
    """Tokens that the cache holds, held-out perplexity, and greedy text behind long prompts."""
    options: dict[str, Any] = {"additional_config": additional}
    if args.tensor_parallel_size > 1:
        options["tensor_parallel_size"] = args.tensor_parallel_size
        # A core for each rank; a GPU needs nothing.
        ranks = "|".join(map(str, range(args.tensor_parallel_size)))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ranks)
    model = str(DEMO / "awq")
    spec = EngineSpec(model, "quantkit-awq", MAX_MODEL_LEN, tuple(options.items()))
    text = HELD_OUT.read_text()
    with Engine(spec, args.out / f"{name}.log") as engine:
        return {
            "tokens": engine.cache_tokens(),
            "perplexity": engine.perplexity(text, SCORED_TOKENS)[0],
            "text": engine.continuations(text, PROMPTS, PROMPT_TOKENS, NEW_TOKENS),
        }


def report(rows: dict[str, dict[str, Any]]) -> None:
    """A table, and what the two caches wrote."""
    print(f"\n  {'KV cache':<12}{'tokens':>12}{'perplexity':>14}")
    for name, row in rows.items():
        print(f"  {name:<12}{row['tokens']:>12,}{row['perplexity']:>14.3f}")
    plain, int4 = rows.values()
    print(f"\n  {int4['tokens'] / plain['tokens']:.2f}x the tokens in the same memory.")
    pairs = zip(plain["text"], int4["text"], strict=True)
    same = sum(a == b for pair in pairs for a, b in zip(*pair, strict=True))
    print(f"  {same} of {PROMPTS * NEW_TOKENS} greedy tokens are the same.")


if __name__ == "__main__":
    sys.exit(main())
