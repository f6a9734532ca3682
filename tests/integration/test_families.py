"""Model families: the engine's log-probabilities are those of the float32 twin."""

import pytest

from tests.helpers import quantized_checkpoint
from tests.integration.engines import EngineHost
from tests.integration.reference import assert_same_scores, prompts, twin_scores
from tests.integration.schemes import awq, compressed, gptq
from tests.tiny_models import create_tiny_model

pytestmark = pytest.mark.engine


FAMILIES = {
    "llama": ("quantkit-gptq", gptq(4, 128, symmetric=False, act_order=True)),
    "mistral": ("quantkit-awq", awq(32)),
    "qwen2": ("quantkit-gptq", gptq(3, 64, "gptq_v2", symmetric=False)),
    "qwen3": ("quantkit-gptq", compressed(4, 64, symmetric=False, act_order=True)),
    "gemma2": ("quantkit-awq", awq(128)),
    "gemma3": ("quantkit", compressed(8, -1, symmetric=True)),
    "phi3": ("quantkit", gptq(4, 32, symmetric=True, act_order=True)),
    "gpt2": ("quantkit", gptq(4, 64, "gptq_v2", symmetric=False, act_order=True)),
}
"""Family to flag and scheme: every dialect appears on several families."""


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_scores_tokens_as_the_dequantised_model_does(family, tmp_path, engines: EngineHost):
    flag, scheme = FAMILIES[family]
    model = create_tiny_model(family, tmp_path / "model")
    pair = quantized_checkpoint(model, scheme, tmp_path / "pair")
    asked = prompts()

    result = engines.run(pair.quantized, flag, [{"op": "score", "prompts": asked}])

    assert_same_scores(result.answers[0], twin_scores(pair.twin, asked))
