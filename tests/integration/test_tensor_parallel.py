"""Two ranks compute what one does, wherever a shard's boundary falls."""

from pathlib import Path

import pytest

from tests.integration.engines import TWO_RANKS, EngineHost
from tests.integration.footprints import MEMORY, check_footprint
from tests.integration.reference import assert_same_scores, prompts, twin_scores
from tests.integration.schemes import compressed, gptq, ruled_checkpoint
from tests.tiny_models import create_tiny_model
from vllm_quantkit.formats import get_format
from vllm_quantkit.spec import LayerRules, SchemeSpec

pytestmark = pytest.mark.engine

VOCABULARY = 500  # padded to 512, so that only the second rank holds padding

CASES = {
    "act order, group cut by the shard, one KV head": (
        gptq(4, 96, symmetric=False, act_order=True),
        {"intermediate_size": 500, "num_key_value_heads": 1},
    ),
    "groups in order, cut by the shard": (
        compressed(5, 128, symmetric=False),
        {"intermediate_size": 320},
    ),
}
"""A checkpoint's scheme, and what its model has besides the common sizes."""


def checkpoint(scheme: SchemeSpec, extra: dict[str, int], out: Path):
    """A quantised model whose head is quantised too, where the dialect allows it."""
    model = create_tiny_model("llama", out / "model", vocab_size=VOCABULARY, **extra)
    head = scheme if scheme.dialect == "gptq" else None
    names = ("model.layers.0.mlp.up_proj", *(("lm_head",) if head else ()))
    config = get_format(scheme.dialect).render(dict.fromkeys(names, scheme), ignore=())
    return ruled_checkpoint(model, LayerRules(default=scheme, lm_head=head), config, out / "pair")


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_score_as_the_dequantised_model_does_also_after_a_reload(
    case, tmp_path, engines: EngineHost
):
    pair = checkpoint(*CASES[case], tmp_path)
    asked = prompts(vocabulary=VOCABULARY)
    score = {"op": "score", "prompts": asked}

    answers = engines.run(
        pair.quantized,
        "quantkit",
        [score, {"op": "reload"}, score, MEMORY, {"op": "score_window", "tokens": asked[0]}],
        env=TWO_RANKS,
        tensor_parallel_size=2,
    ).answers

    assert_same_scores(answers[0], twin_scores(pair.twin, asked))
    assert answers[2] == answers[0]
    check_footprint(answers[3], pair.quantized, "quantkit", tp=2)
    # Only the first rank has listened to the logits; it saw all positions and the whole vocabulary.
    assert answers[4]["losses"] == pytest.approx([-x for x in answers[0][0]], abs=1e-5)


def test_each_pipeline_stage_takes_its_own_layers(tmp_path, engines: EngineHost):
    """Starting is all that can be tested: on CPU vLLM itself dies on a pipeline's first step.

    It does so with 16-bit models too (KeyError of the request in `update_from_output`).
    """
    scheme = gptq(4, 64, symmetric=False, act_order=True)
    pair = checkpoint(scheme, {"num_hidden_layers": 3}, tmp_path)

    engines.run(pair.quantized, "quantkit", [], env=TWO_RANKS, pipeline_parallel_size=2)
