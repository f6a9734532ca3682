"""Every command by its name, with an example of its use."""

from __future__ import annotations

from collections.abc import Callable

import typer

from vllm_quantkit.cli.calibrate import calibrate, calibrate_kv
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
