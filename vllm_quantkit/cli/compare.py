"""`quantkit compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_quantkit.cli.options import (
    OUTPUT,
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
from vllm_quantkit.cli.running import GOES_ON, told
from vllm_quantkit.terminal import Terminal

ROWS, QUALITY, SPEED = "Rows", "Quality", "Speed"


def compare(
    model: Model,
    rows: Annotated[
        str | None,
        option(
            "Ways to serve it: 16-bit,fp8,smoothquant,int8,gptq,awq,awq+kv4. There are also rtn, "
            "mse, awq+gptq, smoothquant+gptq, fp8-block; at load quantkit-int4, quantkit-int8, "
            "quantkit-llm-int8 and the like, or vllm:METHOD; kv4, or +kv4 behind any; "
            "LABEL=FOLDER of a checkpoint, LABEL=FILE.yaml of a recipe.",
            ROWS,
        ),
    ] = None,
    add: Annotated[
        list[str] | None, option("More rows beside those; may be repeated.", ROWS)
    ] = None,
    quick: Annotated[
        bool,
        option(
            "Few windows, samples and rounds, no torch.compile: to try it out.", ROWS, "--quick"
        ),
    ] = False,
    source: Source = None,
    samples: Samples = None,
    length: Length = None,
    packing: Packing = None,
    held_out: HeldOut = None,
    seed: Seed = None,
    text_column: TextColumn = None,
    allow_few_samples: FewSamples = None,
    quality: Annotated[
        bool, option("Perplexity, KL divergence and top-1 agreement.", QUALITY)
    ] = True,
    text: Annotated[
        str | None,
        option(
            "Held-out text, as --calibration has it; without, documents of --calibration that "
            "calibrate nothing.",
            QUALITY,
        ),
    ] = None,
    windows: Annotated[int | None, option("Of held-out text; 32.", QUALITY)] = None,
    window_length: Annotated[
        int | None, option("Tokens of each; 2048 or the model's maximum.", QUALITY)
    ] = None,
    tasks: Annotated[
        str | None, option("Of lm-eval, with commas between them: mmlu,gsm8k.", QUALITY)
    ] = None,
    tasks_path: Annotated[
        Path | None, option("Folder with tasks of your own, in lm-eval's YAML.", QUALITY)
    ] = None,
    tasks_limit: Annotated[int | None, option("Questions of each task; all.", QUALITY)] = None,
    tasks_fewshot: Annotated[
        int | None, option("Examples in each prompt; as the task says.", QUALITY)
    ] = None,
    speed: Annotated[bool, option("Decode and prefill, engines in turns.", SPEED)] = True,
    batches: Annotated[str | None, option("Sequences that decode together; 1,8,32.", SPEED)] = None,
    prompts: Annotated[
        str | None, option("Tokens of prompts that are prefilled; 448.", SPEED)
    ] = None,
    tokens: Annotated[int | None, option("That each sequence decodes; 32.", SPEED)] = None,
    rounds: Annotated[
        int | None, option("In each, everything is measured once, in turns; 6.", SPEED)
    ] = None,
    gate: Annotated[
        float | None,
        option("Relative difference of perplexity beyond which there is no speed; 0.5.", SPEED),
    ] = None,
    together: Annotated[
        bool | None,
        option(
            "Engines at the same time, or started anew for every turn; as memory allows.",
            SPEED,
            "--together/--one-at-a-time",
        ),
    ] = None,
    tensor_parallel_size: Annotated[int | None, option("Ranks of each engine; 1.", SPEED)] = None,
    enforce_eager: Annotated[
        bool | None, option("Without torch.compile and CUDA graphs.", SPEED, "--enforce-eager")
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, option("Share of the GPU for each engine; 0.9 for all.", SPEED)
    ] = None,
    device: Device = None,
    precision: Precision = None,
    hidden_states: HiddenStates = None,
    batch_tokens: BatchTokens = None,
    trust_remote_code: RemoteCode = None,
    out: Annotated[
        Path | None,
        option("Folder of table.md, .csv, .json and .svg; quantkit-compare/NAME.", OUTPUT),
    ] = None,
    work: Annotated[
        Path | None,
        option("Folder of checkpoints and measurements; in the cache folder.", OUTPUT),
    ] = None,
    fresh: Annotated[
        bool, option("Forget what earlier runs made and measured.", OUTPUT, "--fresh")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure what every scheme costs and gains this model on this machine, in one table.

    Makes the checkpoints it needs, and keeps them and every figure: a run that was cut off goes on
    where it stopped, and another row is measured beside those that are there.
    """
    options = given(locals())
    from vllm_quantkit.compare.commands import run_compare
    from vllm_quantkit.compare.request import read_request

    terminal = Terminal(as_json=as_json, quiet=quiet)
    with told(terminal, GOES_ON):
        raise typer.Exit(run_compare(read_request(options), terminal))
