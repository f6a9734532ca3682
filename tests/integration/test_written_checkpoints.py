"""What the quantiser writes is served by vLLM's own code and by quantkit, and means the same.

vLLM on a CPU takes by itself: integers of 4 bits in groups, as compressed-tensors symmetric or not,
as GPTQ symmetric, as AWQ asymmetric, all in bfloat16; W8A8 in integers and FP8 per channel and
token. Weights of other widths it leaves to quantkit, which needs no flag for them.
"""

import pytest
import torch

from tests.integration.engines import EngineHost
from tests.integration.reference import (
    assert_same_scores,
    assert_similar_scores,
    mean_difference,
    prompts,
    token_scores,
)
from tests.reference_model import load_reference, merged_outputs
from tests.tiny_models import create_tiny_model
from tests.written_models import write_model
from tests.written_schemes import (
    FLOAT,
    MIXED,
    MIXED_GPTQ,
    MIXED_QUANTKIT,
    TOKEN_FP8,
    UNIFORM,
    W8A8,
    by_part,
    compressed,
    integers,
)
from vllm_quantkit.formats import get_format

pytestmark = pytest.mark.engine

BFLOAT16_TOLERANCE = 0.06
"""Mean |difference| of log-probabilities, engine in bfloat16 and reference in float32.

bfloat16 keeps 8 bits of a number, which moves the scores of these two layers by 0.03. 4 bits of
round-to-nearest move them by 0.5, and a scale, zero-point or order that is misread by more.
"""

LAYER_TOLERANCE = 1e-3
"""Relative difference of a layer's outputs on equal inputs, in float32.

Only the order of sums differs, but a value next to a rounding boundary may fall to its other side:
one of K = 256 codes then differs by a step, which is 1 / 127 of the largest.
"""

AWQ = get_format("awq").scheme(integers(4, 64, symmetric=False), None)

IN_TREE = {
    "compressed-tensors, two formats": MIXED,
    "compressed-tensors, asymmetric": by_part(UNIFORM["W4A16, group 64, asymmetric"], {}),
    "gptq, two group sizes": MIXED_GPTQ,
    "awq": by_part(AWQ, {"layers.0.mlp.down": None}),
}

ONLY_OURS = {
    "compressed-tensors W8A16": by_part(UNIFORM["W8A16 per channel"], {}),
    "quantkit": MIXED_QUANTKIT,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return create_tiny_model("llama", tmp_path_factory.mktemp("llama") / "model")


def reference(source, written):
    layers = {name: (weight, written.schemes[name]) for name, weight in written.weights.items()}
    return load_reference(source, layers)


def runs_quantkit(result) -> bool:
    return any("layers run" in line for line in result.log)


@pytest.mark.parametrize("case", IN_TREE)
def test_vllm_serves_it_itself(case, source, tmp_path, engines: EngineHost):
    written, asked = write_model(source, tmp_path / "out", IN_TREE[case]), prompts()
    score = [{"op": "score", "prompts": asked}]

    result = engines.run(written.folder, None, score, dtype="bfloat16")

    assert not runs_quantkit(result)
    expected = token_scores(reference(source, written), asked)
    assert mean_difference(result.answers[0], expected) <= BFLOAT16_TOLERANCE


@pytest.mark.parametrize("case", ["compressed-tensors, two formats", "gptq, two group sizes"])
def test_quantkit_serves_the_same(case, source, tmp_path, engines: EngineHost):
    written, asked = write_model(source, tmp_path / "out", IN_TREE[case]), prompts()

    result = engines.run(written.folder, "quantkit", [{"op": "score", "prompts": asked}])

    assert runs_quantkit(result)
    expected = token_scores(reference(source, written), asked)
    quantised_inputs = any(scheme.activation for scheme in written.schemes.values())
    (assert_similar_scores if quantised_inputs else assert_same_scores)(result.answers[0], expected)


@pytest.mark.parametrize("case", ONLY_OURS)
def test_quantkit_serves_without_a_flag_what_vllm_does_not(case, source, tmp_path, engines):
    written, asked = write_model(source, tmp_path / "out", ONLY_OURS[case]), prompts()
    model = reference(source, written)
    expected = merged_outputs(model, written.schemes, 5)
    asks = [
        {"op": "score", "prompts": asked},
        {"op": "multiply", "layers": list(expected), "rows": 5},
    ]

    result = engines.run(written.folder, None, asks)

    assert runs_quantkit(result)
    assert_similar_scores(result.answers[0], token_scores(model, asked))
    assert_same_outputs(result.answers[1], expected)


def test_vllm_multiplies_w8a8_and_fp8_of_one_checkpoint(source, tmp_path, engines: EngineHost):
    scheme_for = by_part(W8A8, {"o_proj": compressed(FLOAT, TOKEN_FP8)})
    written = write_model(source, tmp_path / "out", scheme_for)
    expected = merged_outputs(reference(source, written), written.schemes, 5)

    ask = {"op": "multiply", "layers": list(expected), "rows": 5}
    result = engines.run(written.folder, None, [ask])

    assert not runs_quantkit(result)
    assert_same_outputs(result.answers[0], expected)


def assert_same_outputs(found, expected):
    for name, outputs in zip(expected, found, strict=True):
        difference = (torch.tensor(outputs) - expected[name]).norm() / expected[name].norm()
        assert difference <= LAYER_TOLERANCE, f"{name} differs by {difference:.1e}"
