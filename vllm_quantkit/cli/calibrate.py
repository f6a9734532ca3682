"""`quantkit calibrate` and `quantkit calibrate-kv`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_quantkit.cli.options import (
    NUMERICS,
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
from vllm_quantkit.cli.running import told
from vllm_quantkit.terminal import Terminal


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
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Collect the largest input of every channel, for smoothing when a model is loaded."""
    options = given(locals())
    from vllm_quantkit.quantize import commands

    terminal = Terminal(as_json=as_json, quiet=quiet)
    with told(terminal):
        commands.run_calibrate(model, out, options, terminal)


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
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Learn what a KV cache of 4 bits should take from keys, and which layers it does for."""
    options = given(locals())
    from vllm_quantkit.quantize import commands

    terminal = Terminal(as_json=as_json, quiet=quiet)
    with told(terminal):
        commands.run_calibrate_kv(model, out, bound, options, terminal)
