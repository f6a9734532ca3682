"""Methods that quantise at load, and what an engine that did so must compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.integration.engines import EngineHost
from tests.integration.footprints import MEMORY, check_footprint
from tests.integration.foreseen import check_log
from tests.integration.layers import ROWS, check_layers
from tests.integration.reference import assert_similar_scores, prompts, token_scores
from tests.reference_model import load_reference, merged_outputs, quantize_as_at_load
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.options import LayerOptions, read_options
from vllm_quantkit.schemes import SCHEMES, get_method
from vllm_quantkit.schemes.at_load import load_rules


def quantises_at_load(name: str) -> bool:
    try:
        return get_method(name).at_load(LayerOptions()) is not None
    except UnsupportedScheme:
        return False


AT_LOAD = [name for name in SCHEMES if quantises_at_load(name)]
assert {"quantkit-fp8", "quantkit-int4"} <= set(AT_LOAD)


def check(
    engines: EngineHost, folder: Path, method: str, quantkit: dict[str, Any], *, count: int = 3
) -> list[str]:
    """Every linear layer computes its definition, and so do all of them; returns the log."""
    rules = load_rules(get_method(method), read_options({"quantkit": quantkit}))
    layers = quantize_as_at_load(folder, rules)
    reference = load_reference(folder, layers)
    outputs = merged_outputs(reference, layers, ROWS)
    asked = prompts(count)
    asks = [
        {"op": "score", "prompts": asked},
        {"op": "multiply", "layers": list(outputs), "rows": ROWS},
        MEMORY,
    ]
    config = {"additional_config": {"quantkit": quantkit}} if quantkit else {}
    result = engines.run(folder, method, asks, **config)
    check_layers(result.answers[1], outputs)
    assert_similar_scores(result.answers[0], token_scores(reference, asked))
    check_footprint(result.answers[2], folder, method, quantkit)
    check_log(result.log, folder, method, quantkit)
    return result.log
