"""The command `quantkit`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from vllm_quantkit.errors import QuantkitError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True, markup=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended, as shells have it."""


@app.callback()
def main() -> None:
    """Quantise any model, serve it in vLLM with one flag, and know what it cost you."""


def option(help: str, panel: str, *names: str, **kwargs: Any) -> Any:
    """An option with its help, in a panel of the help page."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **kwargs)


NUMERICS, CALIBRATION, RUNNING = "Numerics", "Calibration", "Running"

Model = Annotated[str, typer.Argument(help="A transformers model folder, or a name on the hub.")]
Source = Annotated[
    str | None,
    option(
        "A .txt, .md, .jsonl or .parquet file, a folder of them, or a data set on the hub.",
        CALIBRATION,
        "--calibration",
    ),
]
Samples = Annotated[int | None, option("Samples to calibrate on; 256.", CALIBRATION)]
Length = Annotated[
    int | None, option("Tokens in a sample; 2048 or the model's maximum.", CALIBRATION)
]
Packing = Annotated[
    str | None,
    option("packed: documents joined and cut; padded: one in each sample.", CALIBRATION),
]
HeldOut = Annotated[int | None, option("Samples that quality is measured on; 32.", CALIBRATION)]
Seed = Annotated[int | None, option("Of the choice of documents; 0.", CALIBRATION)]
TextColumn = Annotated[str | None, option("Where the text is in each row.", CALIBRATION)]
FewSamples = Annotated[
    bool | None, option("Permit fewer than 128 samples.", CALIBRATION, "--allow-few-samples")
]
Device = Annotated[str | None, option("Such as cpu or cuda:0.", RUNNING)]
Precision = Annotated[str | None, option("Of calibration: float32, bfloat16 or auto.", RUNNING)]
HiddenStates = Annotated[
    str | None, option("Where they wait between two blocks: cpu or disk.", RUNNING)
]
BatchTokens = Annotated[int | None, option("Tokens that run together; 4096.", RUNNING)]
RemoteCode = Annotated[bool | None, option("Run code in the model's folder.", RUNNING)]


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="The new model folder; must not exist.")] = None,
    scheme: Annotated[
        str | None,
        option(
            "awq, gptq, rtn, mse, awq+gptq, int8, smoothquant, smoothquant+gptq, fp8, fp8-block.",
            NUMERICS,
        ),
    ] = None,
    recipe: Annotated[
        Path | None, option("YAML: options below by name, and rules for layers.", NUMERICS)
    ] = None,
    bits: Annotated[int | None, option("Of integer weights, 2 to 8.", NUMERICS)] = None,
    group_size: Annotated[
        int | None, option("Input channels per scale; -1: all.", NUMERICS)
    ] = None,
    symmetric: Annotated[
        bool | None, option("Weights without or with zero-points.", NUMERICS, "--sym/--asym")
    ] = None,
    act_order: Annotated[str | None, option("GPTQ: none, static or group.", NUMERICS)] = None,
    damping: Annotated[float | None, option("GPTQ: share of the mean diagonal.", NUMERICS)] = None,
    alpha: Annotated[str | None, option("SmoothQuant: 0 to 1, or search.", NUMERICS)] = None,
    scales: Annotated[str | None, option("FP8: tensor, channel or block.", NUMERICS)] = None,
    activations: Annotated[
        str | None, option("8-bit inputs: none, dynamic or static.", NUMERICS)
    ] = None,
    ignore: Annotated[
        list[str] | None,
        option("Layers that stay in 16 bits: a name, or re: and an expression.", NUMERICS),
    ] = None,
    output_format: Annotated[
        str | None,
        option("compressed-tensors, awq, gptq or quantkit.", NUMERICS, "--format"),
    ] = None,
    true_sequential: Annotated[
        bool | None, option("Calibrate each layer behind quantised ones.", NUMERICS)
    ] = None,
    route_all: Annotated[
        bool | None, option("Calibrate every expert on every token.", NUMERICS)
    ] = None,
    source: Source = None,
    samples: Samples = None,
    length: Length = None,
    packing: Packing = None,
    held_out: HeldOut = None,
    seed: Seed = None,
    text_column: TextColumn = None,
    allow_few_samples: FewSamples = None,
    device: Device = None,
    precision: Precision = None,
    hidden_states: HiddenStates = None,
    batch_tokens: BatchTokens = None,
    layers: Annotated[
        str | None, option("Blocks to try out first, such as 0,last.", RUNNING)
    ] = None,
    resume: Annotated[bool | None, option("Go on with a run that was cut off.", RUNNING)] = None,
    dry_run: Annotated[bool, option("Print plan, sizes and time, and stop.", RUNNING)] = False,
    trust_remote_code: RemoteCode = None,
) -> None:
    """Quantise a model; the new folder loads in vLLM, transformers and SGLang."""
    from vllm_quantkit.quantize import commands

    with _told(resumes=True):
        commands.run_quantize(model, out, recipe, _given(locals()), console, dry_run=dry_run)


@app.command()
def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(help="The file to write; must not exist.")],
    source: Source = None,
    samples: Samples = None,
    length: Length = None,
    packing: Packing = None,
    seed: Seed = None,
    text_column: TextColumn = None,
    allow_few_samples: FewSamples = None,
    device: Device = None,
    precision: Precision = None,
    hidden_states: HiddenStates = None,
    batch_tokens: BatchTokens = None,
    trust_remote_code: RemoteCode = None,
) -> None:
    """Collect the largest input of every channel, for smoothing when a model is loaded."""
    from vllm_quantkit.quantize import commands

    with _told(resumes=False):
        commands.run_calibrate(model, out, _given(locals()), console)


@app.command()
def calibrate_kv(
    model: Model,
    out: Annotated[
        Path, typer.Option(help="The folder to write; MODEL/kv_cache is found by itself.")
    ],
    bound: Annotated[
        float | None,
        option("Output error in 4 bits beyond which a layer keeps 16; 0.25.", NUMERICS),
    ] = None,
    source: Source = None,
    samples: Samples = None,
    length: Length = None,
    packing: Packing = None,
    held_out: HeldOut = None,
    seed: Seed = None,
    text_column: TextColumn = None,
    allow_few_samples: FewSamples = None,
    device: Device = None,
    precision: Precision = None,
    hidden_states: HiddenStates = None,
    batch_tokens: BatchTokens = None,
    trust_remote_code: RemoteCode = None,
) -> None:
    """Learn what a KV cache of 4 bits should take from keys, and which layers it does for."""
    from vllm_quantkit.quantize import commands

    with _told(resumes=False):
        commands.run_calibrate_kv(model, out, bound, _given(locals()), console)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def _told(*, resumes: bool) -> Iterator[None]:
    """An error becomes one sentence and exit status 1; Ctrl-C says how to go on."""
    try:
        yield
    except QuantkitError as error:
        errors.print(Text.assemble(("error:", "bold red"), " ", str(error)))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        how = "with --resume goes on where this one stopped" if resumes else "begins anew"
        errors.print(f"interrupted: the same command {how}.")
        raise typer.Exit(INTERRUPTED) from None


if __name__ == "__main__":
    app()
