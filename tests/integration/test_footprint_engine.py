"""Models whose memory no other engine test compares: in 16 bits, INT4 caches, vLLM's own layers.

Weights and caches of what is quantised are compared where engines of those schemes run anyway.
"""

import pytest

from tests.integration.engines import ROOT, EngineHost
from tests.integration.footprints import MEMORY, check_footprint
from tests.integration.foreseen import check_kernels, foresee
from tests.tiny_models import create_tiny_model

pytestmark = pytest.mark.engine

DEMO = ROOT / "examples" / "tiny-lm"
KERNELS = {"op": "kernels"}


def test_16_bits_with_a_tied_head(tmp_path, engines: EngineHost):
    model = create_tiny_model("gemma3", tmp_path / "model")

    memory, kernels = engines.run(model, None, [MEMORY, KERNELS]).answers

    found = check_footprint(memory, model, None)
    assert found.weight_bytes == found.weight_bytes_16bit
    assert found.head_bytes == 0
    methods = {layer["method"] for layer in kernels.values()}
    assert methods == {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"}


def test_an_int4_cache_beside_16_bits(tmp_path, engines: EngineHost):
    model = create_tiny_model("qwen2", tmp_path / "model", vocab_size=500, head_dim=64)

    (memory,) = engines.run(model, "quantkit-kv4", [MEMORY]).answers

    check_footprint(memory, model, "quantkit-kv4")


def test_checkpoints_that_vllm_serves_itself(engines: EngineHost):
    """As stored: codes and zero-points of 4 bits, scales of 16; a cache of 8 bits."""
    folder = DEMO / "awq"
    answers = engines.run(
        folder, None, [MEMORY, KERNELS], dtype="bfloat16", kv_cache_dtype="fp8"
    ).answers

    found = check_footprint(answers[0], folder, None, dtype="bfloat16", kv_cache_dtype="fp8")
    assert found.linear_bytes < 0.3 * found.weight_bytes_16bit
    assert {layer["kernel"] for layer in answers[1].values()} == {"", "CPUWNA16LinearKernel"}
    check_kernels(answers[1], foresee(folder, None, dtype="bfloat16", kv_cache_dtype="fp8"))


def test_kernels_are_told_by_layer(engines: EngineHost):
    folder = DEMO / "gptq"
    answers = engines.run(folder, "quantkit-gptq", [MEMORY, KERNELS]).answers

    check_footprint(answers[0], folder, "quantkit-gptq")
    layer = answers[1]["model.layers.3.mlp.gate_up_proj"]
    assert layer["method"] == "QuantkitLinearMethod"
    assert layer["kernel"].endswith("(W4A16), 4 bits, group 64")
    check_kernels(answers[1], foresee(folder, "quantkit-gptq"))
