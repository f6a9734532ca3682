"""Every command by its name, with an example of its use."""

from __future__ import annotations

from collections.abc import Callable

import typer

from vllm_quantkit.cli.advise import advise
from vllm_quantkit.cli.bench import bench
from vllm_quantkit.cli.calibrate import calibrate, calibrate_kv
from vllm_quantkit.cli.check import check
from vllm_quantkit.cli.compare import compare
from vllm_quantkit.cli.evaluate import evaluate
from vllm_quantkit.cli.quantize import quantize

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Quantise any model, serve it in vLLM with one flag, and know what it cost you."""


def add(name: str, command: Callable[..., None], *examples: str) -> None:
    """Gives `quantkit` a command whose help ends with examples."""
    lines = "".join(f"\n\n  quantkit {name} {example}" for example in examples)
    app.command(name, epilog=f"Example:{lines}")(command)


add("quantize", quantize, "MODEL --scheme awq --calibration text.jsonl --out MODEL-AWQ")
add("calibrate", calibrate, "MODEL --calibration text.jsonl --out stats.safetensors")
add("calibrate-kv", calibrate_kv, "MODEL --calibration text.jsonl --out MODEL/kv_cache")
add("check", check, "MODEL --quantization quantkit-int4 --gpu L40S --tp 2")
add("advise", advise, "MODEL --gpu H100 --context 8192 --batch 32 --goal throughput")
add(
    "bench",
    bench,
    "MODEL --schemes 16-bit,quantkit-fp8,awq=MODEL-AWQ,quantkit-kv4 --batches 1,8,32",
    "MODEL --server http://localhost:8000 --request-rate 2,8,inf",
)
add(
    "eval",
    evaluate,
    "MODEL-AWQ --against MODEL --max-kl 0.05 --max-ppl-increase 2%",
    "MODEL --quantization quantkit-int4 --text text.jsonl --out REPORT",
)
add(
    "compare",
    compare,
    "MODEL --calibration text.jsonl --text held_out.txt",
    "MODEL --calibration text.jsonl --rows fp8,awq+kv4,theirs=FOLDER --batches 1,16",
)
