"""`quantkit bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_quantkit.cli.options import OUTPUT, AsJson, Model, Quiet, given, option
from vllm_quantkit.cli.running import told
from vllm_quantkit.terminal import Terminal

MEASURED, ENGINES, SERVERS = "What is measured", "Engines", "Servers"


def bench(
    model: Model,
    schemes: Annotated[
        str | None,
        option(
            "Ways to serve it, the baseline first: 16-bit, vllm, vllm:METHOD, quantkit-fp8 and the "
            "like, LABEL=FOLDER of a checkpoint, each with +kv4 for an INT4 KV cache; by default "
            "16-bit, or what the checkpoint is.",
            MEASURED,
        ),
    ] = None,
    batches: Annotated[
        str | None, option("Sequences that decode together; 1,8,32.", MEASURED)
    ] = None,
    prompts: Annotated[
        str | None, option("Tokens of prompts that are prefilled; 448.", MEASURED)
    ] = None,
    tokens: Annotated[int | None, option("That each sequence decodes; 32.", MEASURED)] = None,
    context: Annotated[
        int | None, option("Tokens of the prompts behind which it does; 16.", MEASURED)
    ] = None,
    load: Annotated[
        int | None,
        option("Sequences that decode while a prompt waits for its first token; 8.", MEASURED),
    ] = None,
    mixed: Annotated[
        int | None, option("Requests of a batch of different lengths; 32.", MEASURED)
    ] = None,
    rounds: Annotated[
        int | None, option("In each, everything is measured once, in turns; 6.", MEASURED)
    ] = None,
    gate: Annotated[
        float | None,
        option(
            "Relative difference from the baseline's perplexity that is allowed; 0.5.", MEASURED
        ),
    ] = None,
    text: Annotated[
        Path | None, option("Perplexity is measured on; a text that comes along.", MEASURED)
    ] = None,
    together: Annotated[
        bool | None,
        option(
            "Engines at the same time, or started anew for every turn; as memory allows.",
            ENGINES,
            "--together/--one-at-a-time",
        ),
    ] = None,
    max_model_len: Annotated[
        int | None, option("Longest sequence; what is measured needs.", ENGINES)
    ] = None,
    tensor_parallel_size: Annotated[int | None, option("Ranks of each engine; 1.", ENGINES)] = None,
    enforce_eager: Annotated[
        bool | None, option("Without torch.compile and CUDA graphs.", ENGINES, "--enforce-eager")
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, option("Share of the GPU for each engine; 0.9 for all.", ENGINES)
    ] = None,
    additional_config: Annotated[
        str | None, option("JSON, as vllm serve takes it: options of quantkit.", ENGINES)
    ] = None,
    server: Annotated[
        list[str] | None,
        option(
            "http://HOST:PORT of a running OpenAI-compatible server, or LABEL=http://...; may be "
            "repeated. MODEL then is the tokenizer's, and no engine is started.",
            SERVERS,
        ),
    ] = None,
    request_rate: Annotated[
        str | None, option("Requests per second; inf: all at once.", SERVERS)
    ] = None,
    concurrency: Annotated[
        int | None, option("Most requests at a time; no limit.", SERVERS)
    ] = None,
    num_prompts: Annotated[int | None, option("Requests in a measurement; 64.", SERVERS)] = None,
    input_len: Annotated[int | None, option("Tokens of each prompt; 256.", SERVERS)] = None,
    output_len: Annotated[int | None, option("Tokens of each answer; 64.", SERVERS)] = None,
    strict: Annotated[
        bool,
        option("Exit status 1 where a scheme failed or noise may explain a difference.", OUTPUT),
    ] = False,
    out: Annotated[
        Path | None, option("New folder for bench.json, bench.csv and bench.md.", OUTPUT)
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure how fast a model is served, in vLLM engines that take turns, or by servers.

    Decode, prefill, time to first token, time between tokens, a mixed batch and memory; medians,
    spread, and ratios by round with an interval, so that noise is not taken for a difference.
    """
    options = given(locals())
    from vllm_quantkit.bench.commands import run_bench
    from vllm_quantkit.bench.requests import read_request

    terminal = Terminal(as_json=as_json, quiet=quiet)
    with told(terminal):
        raise typer.Exit(run_bench(read_request(options), terminal))
