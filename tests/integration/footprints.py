"""What an engine's weights and cache take, against what config.json and headers foretold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_quantkit.footprint import Footprint, Workload, footprint, kv_cache_for, read_model
from vllm_quantkit.hardware import find_device
from vllm_quantkit.options import read_options

MEMORY = {"op": "memory"}
"""Asks an engine for what `check_footprint` compares."""

TOLERANCE = 0.03
"""What is promised. Most models are foretold to a few bytes; what is not: zero-points of a head's
padding rows, and ranks whose act-order groups are cut by chance."""

SCALARS = 64
"""Bytes a layer of attention keeps in scales that are no weights."""


def check_footprint(
    answer: Mapping[str, Any],
    folder: Path,
    method: str | None,
    options: Mapping[str, Any] | None = None,
    *,
    tp: int = 1,
    dtype: str = "float32",
    kv_cache_dtype: str = "auto",
    cache_bytes: int = 1 << 30,
) -> Footprint:
    """Weights, linear layers alone, bytes of a token, and the tokens of a cache of one GiB."""
    model = read_model(str(folder))
    given = read_options({"quantkit": options or {}})
    found = footprint(
        model,
        method=method,
        device=find_device("cpu"),
        kv=kv_cache_for(method, given, kv_cache_dtype),
        options=given,
        tp=tp,
        workload=Workload.model_validate({"dtype": dtype, "cache_bytes": cache_bytes}),
    )
    assert len(answer["ranks"]) == tp
    for rank in answer["ranks"]:
        scalars = SCALARS * model.facts.num_layers
        assert_close(found.weight_bytes, rank["weights"], "weights", scalars)
        assert_close(found.linear_bytes, rank["linear"], "linear layers")
        assert_close(found.kv_bytes_per_token, rank["cache_token"], "a token of the cache")
    block = answer["cache"]["block_size"]
    # Where layers differ in what they keep, vLLM's blocks are not those of whole tokens.
    assert (
        model.facts.windowed_layers or abs(found.cache_tokens - answer["cache"]["tokens"]) < block
    )
    return found


def assert_close(foretold: int, measured: int, what: str, allowance: int = 0) -> None:
    assert abs(foretold - measured) <= TOLERANCE * measured + allowance, (
        f"{what}: {foretold} bytes foretold, {measured} measured"
    )
