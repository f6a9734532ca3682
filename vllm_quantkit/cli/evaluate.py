"""`quantkit eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_quantkit.cli.options import OUTPUT, AsJson, Model, Quiet, given, option
from vllm_quantkit.cli.running import GOES_ON, told
from vllm_quantkit.terminal import Terminal

MODELS, TEXT, MORE, LIMITS = "Models", "Text", "More to measure", "Limits"


def evaluate(
    model: Model,
    against: Annotated[
        str | None,
        option("The 16-bit model, folder or hub name; the one that the report names.", MODELS),
    ] = None,
    quantization: Annotated[
        str | None,
        option("As vllm serve takes it, such as quantkit-int4 for a 16-bit MODEL.", MODELS),
    ] = None,
    additional_config: Annotated[
        str | None, option("JSON, as vllm serve takes it: options of quantkit.", MODELS)
    ] = None,
    kv_cache_dtype: Annotated[
        str | None,
        option(
            "As vllm serve takes it. With a cache of 4 bits every key and value is read from the "
            "cache, so that its error shows.",
            MODELS,
        ),
    ] = None,
    dtype: Annotated[
        str | None, option("Of both models; auto in vLLM, float32 in transformers.", MODELS)
    ] = None,
    tensor_parallel_size: Annotated[int | None, option("Ranks of each engine; 1.", MODELS)] = None,
    backend: Annotated[
        str | None, option("vllm, or hf: transformers, rounding as when served.", MODELS)
    ] = None,
    text: Annotated[
        str | None,
        option(
            "A .txt, .md, .jsonl or .parquet file, a folder of them, or a data set on the hub; the "
            "windows that quantising held out.",
            TEXT,
        ),
    ] = None,
    windows: Annotated[
        int | None, option("Of text; all that were held out, or 32 of another text.", TEXT)
    ] = None,
    length: Annotated[
        int | None, option("Tokens in a window; 2048, or what the model takes.", TEXT)
    ] = None,
    seed: Annotated[int | None, option("Of the choice of documents; 0.", TEXT)] = None,
    text_column: Annotated[str | None, option("Where the text is in each row.", TEXT)] = None,
    by_layer: Annotated[
        str | None,
        option(
            "What each layer costs, in transformers: restore (one to 16 bits at a time), quantise "
            "(one at a time), or approximate (the latter, from the Fisher information).",
            MORE,
        ),
    ] = None,
    by_layer_windows: Annotated[int | None, option("Of the text, for --by-layer; 4.", MORE)] = None,
    tasks: Annotated[
        str | None, option("Of lm-eval, such as mmlu,gsm8k; needs the extra eval.", MORE)
    ] = None,
    tasks_path: Annotated[
        Path | None, option("Folder with tasks of your own, in lm-eval's YAML.", MORE)
    ] = None,
    tasks_limit: Annotated[int | None, option("Questions of each task; all.", MORE)] = None,
    tasks_fewshot: Annotated[
        int | None, option("Examples in each prompt; as the task says.", MORE)
    ] = None,
    long: Annotated[int | None, option("Tokens of long continuations, such as 2048.", MORE)] = None,
    long_prompts: Annotated[
        Path | None,
        option("Prompts to continue, .txt or .jsonl; by default windows of the text.", MORE),
    ] = None,
    long_prompt_count: Annotated[int | None, option("Prompts to continue; 8.", MORE)] = None,
    max_kl: Annotated[
        float | None, option("Fail beyond this mean KL divergence, nats per token.", LIMITS)
    ] = None,
    max_ppl_increase: Annotated[
        str | None, option("Fail beyond this increase of perplexity: 0.02, or 2%.", LIMITS)
    ] = None,
    min_top1: Annotated[
        str | None,
        option("Fail where fewer most likely tokens stay the same: 0.95, or 95%.", LIMITS),
    ] = None,
    max_task_drop: Annotated[
        float | None, option("Fail where a task's metric is worse by more.", LIMITS)
    ] = None,
    out: Annotated[
        Path | None, option("Folder for the report; a quantised checkpoint's own.", OUTPUT)
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure what quantising cost, in the vLLM engine: perplexity, KL divergence, top-1 agreement.

    On the same held-out tokens as the 16-bit model, whose log-probabilities are kept for the next
    run. Limits compare with the figure as measured, and warn where they lie inside its interval.
    """
    options = given(locals())
    from vllm_quantkit.evaluate.command import run_evaluate
    from vllm_quantkit.evaluate.request import read_request

    terminal = Terminal(as_json=as_json, quiet=quiet)
    with told(terminal, GOES_ON):
        raise typer.Exit(run_evaluate(read_request(options), terminal))
