"""`quantkit quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_quantkit.cli.options import (
    NUMERICS,
    RUNNING,
    AsJson,
    BatchTokens,
    Device,
    FewSamples,
    HeldOut,
    HiddenStates,
    Length,
    Model,
    Packing,
    Precision,
    Quiet,
    RemoteCode,
    Samples,
    Seed,
    Source,
    TextColumn,
    given,
    option,
)
from vllm_quantkit.cli.running import RESUMES, told
from vllm_quantkit.terminal import Terminal


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
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Quantise a model; the new folder loads in vLLM, transformers and SGLang."""
    options = given(locals())
    from vllm_quantkit.quantize import commands

    terminal = Terminal(as_json=as_json, quiet=quiet)
    with told(terminal, RESUMES):
        commands.run_quantize(model, out, recipe, options, terminal, dry_run=dry_run)
