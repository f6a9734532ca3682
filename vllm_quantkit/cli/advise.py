"""`quantkit advise`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_quantkit.cli.options import AsJson, Model, Quiet, given, option
from vllm_quantkit.cli.running import told
from vllm_quantkit.terminal import Terminal

WORKLOAD, MEASURED, SEARCH = "Workload", "Measurements", "Search for a mixture"


def advise(
    model: Model,
    context: Annotated[int, option("Tokens of a sequence, prompt and answer.", WORKLOAD)],
    batch: Annotated[int, option("Sequences at a time.", WORKLOAD)] = 1,
    gpu: Annotated[
        str | None,
        option("Such as H100, L40S, 'RTX 4090', 'M3 Max' or cpu; what this machine has.", WORKLOAD),
    ] = None,
    output: Annotated[
        int | None, option("Tokens of an answer; a quarter of --context.", WORKLOAD)
    ] = None,
    goal: Annotated[
        str, option("throughput, latency, memory or quality.", WORKLOAD)
    ] = "throughput",
    max_kl: Annotated[
        float | None,
        option("Largest mean KL divergence from the 16-bit model, in nats.", WORKLOAD),
    ] = None,
    tp: Annotated[int, option("Tensor-parallel size.", WORKLOAD)] = 1,
    train: Annotated[
        str, option("What to train on the quantised model: none, lora or full.", WORKLOAD)
    ] = "none",
    measured: Annotated[
        list[Path] | None,
        option("Checkpoints of this model whose reports are to be used; repeatable.", MEASURED),
    ] = None,
    measure: Annotated[bool, option("Time this machine where it is the device.", MEASURED)] = True,
    search: Annotated[
        bool, option("Find a scheme for each layer, under a budget.", SEARCH)
    ] = False,
    budget_gib: Annotated[float | None, option("Of all weights.", SEARCH)] = None,
    min_speedup: Annotated[
        float | None, option("Of a decode step of --batch, over 16 bits.", SEARCH)
    ] = None,
    measure_sensitivity: Annotated[
        Path | None,
        option("Text to measure each layer on; else --measured gives what was.", SEARCH),
    ] = None,
    sensitivity_windows: Annotated[int | None, option("Of that text; 4.", SEARCH)] = None,
    sensitivity_length: Annotated[int | None, option("Tokens of a window; 512.", SEARCH)] = None,
    recipe_out: Annotated[
        Path | None, option("Recipe to write, for quantkit quantize --recipe.", SEARCH)
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say which scheme fits a model, a device and a workload, and why."""
    from vllm_quantkit.advise.request import read_request
    from vllm_quantkit.advise.running import run_advise

    terminal = Terminal(as_json=as_json, quiet=quiet)
    with told(terminal):
        request = read_request(
            model=model,
            gpu=gpu,
            workload={
                "context": context,
                "batch": batch,
                "output": output,
                "goal": goal,
                "max_kl": max_kl,
                "tp": tp,
                "training": train,
            },
            measured=measured or (),
            measure=measure,
            search=given(
                {
                    "budget_gib": budget_gib,
                    "min_speedup": min_speedup,
                    "text": measure_sensitivity,
                    "windows": sensitivity_windows,
                    "length": sensitivity_length,
                    "recipe_out": recipe_out,
                }
            )
            if search
            else None,
        )
        status = run_advise(request, terminal)
    raise typer.Exit(status)
