"""16-bit models quantised while they load: every method that can, against its definition."""

from __future__ import annotations

import pytest

from tests.integration.at_load import AT_LOAD, check
from tests.integration.engines import EngineHost
from tests.tiny_models import create_tiny_model

pytestmark = pytest.mark.engine

FAMILIES = {
    "quantkit-fp8": "gemma2",
    "quantkit-smoothquant": "qwen2",
    "quantkit-int8": "gpt2",
    "quantkit-int4": "phi3",
    "quantkit-llm-int8": "mistral",
    "quantkit-fp8-block": "qwen3",
}
"""Families beside Llama: other norms, biases, transposed weights, weights merged in the file."""


@pytest.mark.parametrize("method", AT_LOAD)
def test_llama_computes_what_the_method_means(method, tmp_path, engines: EngineHost):
    log = check(engines, create_tiny_model("llama", tmp_path / "model"), method, {})

    assert any(line.startswith(f"INFO: {method}: 8 layers run") for line in log)
    assert any("relative weight error" in line for line in log)


@pytest.mark.parametrize("method", FAMILIES)
def test_other_families(method, tmp_path, engines: EngineHost):
    check(engines, create_tiny_model(FAMILIES[method], tmp_path / "model"), method, {})
