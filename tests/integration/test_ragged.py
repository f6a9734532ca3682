"""Sizes that no group, word or tile divides."""

import pytest

from tests.helpers import quantized_checkpoint
from tests.integration.engines import EngineHost
from tests.integration.reference import assert_same_scores, prompts, twin_scores
from tests.integration.schemes import awq, compressed, gptq
from tests.tiny_models import create_tiny_model

pytestmark = pytest.mark.engine

RAGGED = {
    "gptq 3 bits, in order": (gptq(3, 64, "gptq_v2", symmetric=False), 501),
    "gptq 4 bits, act order": (gptq(4, 96, symmetric=False, act_order=True), 501),
    "compressed-tensors 5 bits": (compressed(5, 48, symmetric=False), 333),
    "awq": (awq(128), 504),
}
"""Scheme and intermediate size: outputs of one layer, inputs of the next."""


@pytest.mark.parametrize("case", RAGGED)
def test_sizes_that_nothing_divides_are_served_exactly(case, tmp_path, engines: EngineHost):
    scheme, intermediate = RAGGED[case]
    model = create_tiny_model(
        "llama", tmp_path / "model", hidden_size=200, intermediate_size=intermediate
    )
    pair = quantized_checkpoint(model, scheme, tmp_path / "pair")
    asked = prompts()

    result = engines.run(pair.quantized, "quantkit", [{"op": "score", "prompts": asked}])

    assert_same_scores(result.answers[0], twin_scores(pair.twin, asked))
