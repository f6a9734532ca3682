"""`quantkit check`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from vllm_quantkit.cli.options import AsJson, Model, Quiet, option
from vllm_quantkit.cli.running import told
from vllm_quantkit.terminal import Terminal

WHERE, FLAGS = "Where", "Flags of vllm serve"


def check(
    model: Model,
    gpu: Annotated[
        str | None,
        option("H200, L40S, ..., cpu; it need not be here. This machine's.", WHERE),
    ] = None,
    vllm: Annotated[
        str | None, option("Version of vLLM, such as 0.32. The installed one.", WHERE)
    ] = None,
    revision: Annotated[str | None, option("Branch, tag or commit on the hub.", WHERE)] = None,
    quantization: Annotated[
        str | None, option("quantkit, quantkit-int4, ...; none for vLLM's choice.", FLAGS)
    ] = None,
    tp: Annotated[
        int, option("Ranks that share each layer.", FLAGS, "--tp", "--tensor-parallel-size", min=1)
    ] = 1,
    dtype: Annotated[str, option("Of activations: auto, bfloat16, float16, float32.", FLAGS)] = (
        "auto"
    ),
    max_model_len: Annotated[
        int | None, option("Longest sequence; the model's own.", FLAGS, min=1)
    ] = None,
    max_num_seqs: Annotated[int | None, option("Sequences at a time.", FLAGS, min=1)] = None,
    kv_cache_dtype: Annotated[str, option("auto, fp8, int4_per_token_head, ...", FLAGS)] = "auto",
    gpu_memory_utilization: Annotated[
        float, option("Share of a device's memory that the engine takes.", FLAGS, min=0.01, max=1)
    ] = 0.9,
    kv_cache_memory_bytes: Annotated[
        int | None, option("Size of the KV cache; what is left.", FLAGS, min=1)
    ] = None,
    enforce_eager: Annotated[
        bool, option("Without CUDA graphs.", FLAGS, "--enforce-eager")
    ] = False,
    additional_config: Annotated[
        str, option('JSON, such as {"quantkit": {"group_size": 64}}.', FLAGS)
    ] = "{}",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say whether a model will be served, by its config.json and headers: nothing is loaded.

    Which kernel runs each layer and why, what stands in the way and the smallest change that
    helps, memory, and what vLLM does without the plugin. The exit status is 0 if it will be
    served, else 1. VLLM_BATCH_INVARIANT and VLLM_CPU_KVCACHE_SPACE count as in vLLM.
    """
    from vllm_quantkit.check import CheckRequest, run_check

    terminal = Terminal(as_json=as_json, quiet=quiet)
    with told(terminal):
        request = CheckRequest(
            model=model,
            revision=revision,
            quantization=quantization,
            gpu=gpu,
            tp=tp,
            vllm=vllm,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            kv_cache_dtype=kv_cache_dtype,
            memory_utilization=gpu_memory_utilization,
            cache_bytes=kv_cache_memory_bytes,
            cpu_cache_space=_number("VLLM_CPU_KVCACHE_SPACE"),
            enforce_eager=enforce_eager,
            additional_config=additional_config,
            batch_invariant=bool(_number("VLLM_BATCH_INVARIANT")),
        )
        status = run_check(request, terminal)
    raise typer.Exit(status)


def _number(variable: str) -> int | None:
    """What the environment says, as vLLM reads it; None for nothing, or 0."""
    text = os.environ.get(variable, "").strip()
    return int(text) or None if text.isdigit() else None
