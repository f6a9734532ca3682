"""What a user can say about quantisation at load, and what must not change it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.integration.at_load import check
from tests.integration.engines import TWO_RANKS, EngineFailed, EngineHost
from tests.integration.reference import PERPLEXITY_TOLERANCE, Scores, perplexity
from tests.tiny_models import create_tiny_model

pytestmark = pytest.mark.engine

DEMO = Path(__file__).parents[2] / "examples" / "tiny-lm"
DEMO_MODEL, HELD_OUT = DEMO / "bf16", DEMO / "data" / "held_out.txt"

MIXED = {
    "group_size": 64,
    "refine": "hqq",
    "ignore": [r".*\.0\.self_attn\.o_proj"],
    "layers": {
        r".*down_proj": {"method": "quantkit-int8", "refine": "clip"},
        r".*\.1\.self_attn": {"method": "quantkit-smoothquant"},
        r".*\.1\.mlp\.(gate|up)_proj": None,
    },
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return create_tiny_model("llama", tmp_path_factory.mktemp("llama") / "model")


def test_patterns_choose_the_scheme_of_each_layer(llama, engines: EngineHost):
    log = "\n".join(check(engines, llama, "quantkit-int4", MIXED))

    assert re.search(r"2 layers run .*4 bits, group 64", log)
    assert re.search(r"2 layers run .*8 bits, group 64", log)  # the model's group size holds
    assert re.search(r"to 4 bits, group 64, half-quadratic grids \(hqq\); relative weight err", log)
    assert re.search(r"2 layers run .*dynamic INT8 activations per token", log)
    assert (
        "2 linear layers stay in 16 bits: model.layers.0.self_attn.o_proj, "
        "model.layers.1.mlp.gate_up_proj." in log
    )


def test_scales_per_tensor(llama, engines: EngineHost):
    """One prompt: a scale of the whole batch would belong to all of them."""
    options = {"weight_scales": "tensor", "activation_scales": "tensor"}

    log = check(engines, llama, "quantkit-fp8", options, count=1)

    assert any("dynamic E4M3 activations per tensor" in line for line in log)


REFUSED = {
    "another method's option": (
        {"refine": "clip"},
        "refine = 'clip' means nothing to quantkit-fp8; it takes weight_scales, activation_scales",
    ),
    "HQQ without zero-points": (
        {"layers": {".*": {"method": "quantkit-int8", "refine": "hqq"}}},
        "refine = 'hqq' moves zero-points, but symmetric weights have none",
    ),
    "no regular expression": ({"ignore": ["("]}, "'(' is not a regular expression"),
    "no such method": ({"layers": {".*": {"method": "int5"}}}, "method = 'int5' is unknown"),
    "no such key": ({"layers": {".*": {"bits": 5}}}, "bits"),
    "partitions that differ": (
        {"ignore": [".*q_proj"]},
        "must share a scheme, but the checkpoint has model.layers.0.self_attn.q_proj: 16 bits",
    ),
    "a file that is not there": (
        {"activation_stats": "nonesuch.safetensors"},
        "there is no file 'nonesuch.safetensors'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_options(case, llama, engines: EngineHost):
    options, sentence = REFUSED[case]
    with pytest.raises(EngineFailed) as refusal:
        engines.run(llama, "quantkit-fp8", [], additional_config={"quantkit": options})
    assert sentence in str(refusal.value)


@pytest.fixture(scope="module")
def held_out() -> dict[str, Any]:
    """Score requests for text the demo model has not seen, 1,000 tokens of it."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokens = tokenizer.encode(HELD_OUT.read_text()[:8000], add_special_tokens=False)
    return {"op": "score", "prompts": [tokens[i : i + 200] for i in range(0, 1000, 200)]}


def assert_same_perplexity(found: Scores, expected: Scores) -> None:
    """A trained model does not let rounding noise grow as a random one does."""
    assert abs(perplexity(found) / perplexity(expected) - 1) <= PERPLEXITY_TOLERANCE


@pytest.mark.parametrize("method", ["quantkit-int4", "quantkit-smoothquant"])
def test_compiled_and_reloaded(method, held_out, engines: EngineHost):
    """Norms that quantise pass torch.compile; a reload quantises to the same codes again."""
    asks = [dict(held_out), {"op": "reload"}, dict(held_out)]
    eager = engines.run(DEMO_MODEL, method, asks)
    compiled = engines.run(DEMO_MODEL, method, [dict(held_out)], enforce_eager=False)

    assert eager.answers[2] == eager.answers[0]
    assert_same_perplexity(compiled.answers[0], eager.answers[0])


@pytest.mark.parametrize("method", ["quantkit-fp8", "quantkit-int4", "quantkit-llm-int8"])
def test_ranks_compute_what_one_does(method, held_out, engines: EngineHost):
    """Whole rows are quantised before they are cut, also where ranks cut the input channels."""
    one = engines.run(DEMO_MODEL, method, [dict(held_out)])
    two = engines.run(DEMO_MODEL, method, [dict(held_out)], env=TWO_RANKS, tensor_parallel_size=2)

    assert_same_perplexity(two.answers[0], one.answers[0])


def test_the_kv_cache_may_be_e5m2(held_out, engines: EngineHost):
    """With 8-bit weights it costs what it costs the 16-bit model, beside the weights' own 0.1 %."""
    cache = {"kv_cache_dtype": "fp8_e5m2"}
    ours = engines.run(DEMO_MODEL, "quantkit-int8", [dict(held_out)], **cache).answers[0]
    theirs = engines.run(DEMO_MODEL, None, [dict(held_out)], **cache).answers[0]

    assert abs(perplexity(ours) / perplexity(theirs) - 1) < 0.01


MEMORY = re.compile(
    r"(\d+) MiB of 16-bit weights became (\d+) MiB; host memory grew by at most (\d+) MiB.*; "
    r"the largest 16-bit tensor has (\d+) MiB"
)
OTHER_MEMORY = 48
"""MiB that the process takes for other things while it loads: compiled kernels, 16-bit norms and
embeddings, the loader's own buffers. 12 MiB were measured for a model of any size."""


@pytest.mark.parametrize("method", ["quantkit-int4", "quantkit-fp8", "quantkit-smoothquant"])
def test_memory_stays_near_the_quantised_model(method, tmp_path, engines: EngineHost):
    """A model of 174 MiB in 16 bits, whose largest merged layer has 16 MiB of them."""
    model = create_tiny_model(
        "llama",
        tmp_path / "model",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
    )

    log = engines.run(model, method, [], dtype="bfloat16").log

    original, quantised, grown, largest = map(int, MEMORY.search("\n".join(log)).groups())
    assert (original, largest) == (174, 8)
    assert grown <= quantised + 2 * largest + OTHER_MEMORY
