"""16-bit models quantised while they load: every method that can, against its definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.engines import EngineHost
from tests.integration.layers import ROWS, check_layers
from tests.integration.reference import assert_similar_scores, prompts, token_scores
from tests.reference_model import load_reference, merged_outputs, quantize_as_at_load
from tests.tiny_models import create_tiny_model
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.options import LayerOptions, read_options
from vllm_quantkit.schemes import SCHEMES, get_method
from vllm_quantkit.schemes.at_load import load_rules

pytestmark = pytest.mark.engine


def quantises_at_load(name: str) -> bool:
    try:
        get_method(name).at_load(LayerOptions())
    except UnsupportedScheme:
        return False
    return True


AT_LOAD = [name for name in SCHEMES if quantises_at_load(name)]
assert {"quantkit-fp8", "quantkit-int4"} <= set(AT_LOAD)

FAMILIES = {
    "quantkit-fp8": "gemma2",
    "quantkit-smoothquant": "qwen2",
    "quantkit-int8": "gpt2",
    "quantkit-int4": "phi3",
    "quantkit-llm-int8": "mistral",
    "quantkit-fp8-block": "qwen3",
}
"""Families beside Llama: other norms, biases, transposed weights, weights merged in the file."""


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
    ]
    config = {"additional_config": {"quantkit": quantkit}} if quantkit else {}
    result = engines.run(folder, method, asks, **config)
    check_layers(result.answers[1], outputs)
    assert_similar_scores(result.answers[0], token_scores(reference, asked))
    return result.log


@pytest.mark.parametrize("method", AT_LOAD)
def test_llama_computes_what_the_method_means(method, tmp_path, engines: EngineHost):
    log = check(engines, create_tiny_model("llama", tmp_path / "model"), method, {})

    assert any(line.startswith(f"INFO: {method}: 8 layers run") for line in log)
    assert any("relative weight error" in line for line in log)


@pytest.mark.parametrize("method", FAMILIES)
def test_other_families(method, tmp_path, engines: EngineHost):
    check(engines, create_tiny_model(FAMILIES[method], tmp_path / "model"), method, {})
