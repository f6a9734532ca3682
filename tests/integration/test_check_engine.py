"""`quantkit check` says beforehand what an engine runs, refuses, and leaves to vLLM.

What runs every scheme is compared in the tests that start its engines anyway, see `foreseen`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.check import check_cases as cases
from tests.integration.engines import EngineFailed, EngineHost
from tests.integration.foreseen import check_kernels, check_log, foresee
from tests.tiny_models import create_tiny_model
from vllm_quantkit.check.release import find_release
from vllm_quantkit.check.serving import serving_method
from vllm_quantkit.footprint import read_model
from vllm_quantkit.hardware import find_device

pytestmark = pytest.mark.engine

MIXED = {
    "group_size": 64,
    "ignore": [r".*\.0\.self_attn\.o_proj"],
    "layers": {
        r".*down_proj": {"method": "quantkit-int8"},
        r".*\.1\.self_attn": {"method": "quantkit-smoothquant"},
        r".*\.1\.mlp\.(gate|up)_proj": {"method": "quantkit-fp8-block"},
        "lm_head": {"method": "quantkit-llm-int8"},
    },
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return create_tiny_model("llama", tmp_path_factory.mktemp("llama") / "model")


def test_every_layer_of_a_mixture_runs_the_kernel_foretold(llama, engines: EngineHost):
    options = {"additional_config": {"quantkit": MIXED}, "dtype": "bfloat16"}

    result = engines.run(llama, "quantkit-int4", [{"op": "kernels"}], **options)

    report = foresee(llama, "quantkit-int4", quantkit=MIXED, dtype="bfloat16")
    check_kernels(result.answers[0], report)
    check_log(result.log, llama, "quantkit-int4", MIXED, dtype="bfloat16")
    assert len({group.kernel for group in report.groups}) == 6


Refusal = tuple[str, str | None, dict[str, Any], dict[str, Any]]
REFUSALS: dict[str, Refusal] = {
    "needs a checkpoint": ("llama", "quantkit", {}, {}),
    "another method's option": ("llama", "quantkit-fp8", {"refine": "clip"}, {}),
    "no such option": ("llama", "quantkit-int4", {"bits": 5}, {}),
    "another cache": ("llama", "quantkit-kv4", {}, {"kv_cache_dtype": "fp8"}),
    "a cache misread": ("llama", "quantkit-int8", {}, {"kv_cache_dtype": "int8_per_token_head"}),
    "cache options": ("llama", "quantkit-int8", {"kv_cache": {"skip_layers": [0]}}, {}),
    "experts": ("mixtral", "quantkit-int4", {}, {}),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_blocked_an_engine_refuses_in_the_same_words(
    case, tmp_path: Path, engines: EngineHost
):
    family, method, quantkit, options = REFUSALS[case]
    model = create_tiny_model(family, tmp_path / "model")

    report = foresee(model, method, quantkit=quantkit, **options)
    config = {"additional_config": {"quantkit": quantkit}} if quantkit else {}
    with pytest.raises(EngineFailed) as refusal:
        engines.run(model, method, [], **config, **options)

    (blocker,) = report.blockers
    names = blocker.layers[0] if blocker.layers else ""
    for part in blocker.sentence.split(names) if names else [blocker.sentence]:
        assert part in str(refusal.value)


def test_partitions_that_differ(llama, engines: EngineHost):
    """The engine names the first layer, a check all that are alike."""
    quantkit = {"ignore": [".*q_proj"]}

    report = foresee(llama, "quantkit-fp8", quantkit=quantkit)
    with pytest.raises(EngineFailed, match="must share a scheme"):
        engines.run(llama, "quantkit-fp8", [], additional_config={"quantkit": quantkit})

    assert all("must share a scheme" in blocker.sentence for blocker in report.blockers)
    assert report.blockers


def test_a_batch_that_matters(llama, engines: EngineHost):
    report = foresee(llama, "quantkit-int4", batch_invariant=True)
    with pytest.raises(EngineFailed, match="a cpu multiplies one token in another order"):
        engines.run(llama, "quantkit-int4", [], env={"VLLM_BATCH_INVARIANT": "1"})

    assert "a cpu multiplies one token in another order" in report.blockers[0].sentence


@pytest.mark.parametrize(
    ("flags", "words", "subject"),
    [
        ({"tensor_parallel_size": 3}, "must be divisible by tensor parallel size", "tp"),
        ({"max_model_len": 4096}, "max_position_embeddings|max_model_len", "length"),
    ],
)
def test_what_vllm_itself_refuses(flags, words, subject, llama, engines: EngineHost):
    asked = {"tp": 3} if subject == "tp" else flags
    report = foresee(llama, None, **asked)
    with pytest.raises(EngineFailed, match=words):
        engines.run(llama, None, [], **flags)

    (blocker,) = report.blockers
    assert blocker.subject == {"tp": "tensor-parallel"}.get(subject, subject)


CHECKPOINTS = {
    "gptq": cases.GPTQ,
    "gptq, asymmetric": {**cases.GPTQ, "sym": False},
    "gptq, 3 bits": {**cases.GPTQ, "bits": 3},
    "gptq, 8 bits": {**cases.GPTQ, "bits": 8},
    "gptq, groups of 16": {**cases.GPTQ, "group_size": 16},
    "gptq, per channel": {**cases.GPTQ, "group_size": -1},
    "gptq, order": {**cases.GPTQ, "desc_act": True},
    "gptq_v2": {**cases.GPTQ, "quant_method": "gptq_v2"},
    "awq": cases.AWQ,
    "awq, groups of 16": {**cases.AWQ, "group_size": 16},
    "W4A16": cases.compressed(),
    "W4A16, asymmetric": cases.compressed(symmetric=False),
    "W4A16, groups of 16": cases.compressed(group_size=16),
    "W3A16": cases.compressed(num_bits=3),
    "W8A16": cases.compressed(num_bits=8),
    "W8A16, unpacked": cases.eight_bit(activations=False),
    "W8A8": cases.eight_bit(),
    "W8A8, zero-points": cases.eight_bit(symmetric=False),
    "FP8 per channel and token": cases.eight_bit(type="float"),
    "fp8": cases.FP8,
    "fp8, static": {**cases.FP8, "activation_scheme": "static"},
    "fp8, blocks": cases.FP8_BLOCKS,
    "fp8, E5M2": {**cases.FP8, "fmt": "e5m2"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_without_a_flag_the_plugin_claims_what_was_foretold(case, tmp_path: Path):
    """`compat.serves` asks the installed vLLM; the rules of a check know it by its files."""
    from transformers import AutoConfig

    from vllm_quantkit.integration.config import AutoConfig as Claims

    folder = cases.write_config(tmp_path, CHECKPOINTS[case])
    device = find_device("cpu")
    without_amx = tuple(word for word in device.isa if not word.startswith("amx"))
    device = device.model_copy(update={"isa": without_amx})

    model, release = read_model(str(folder)), find_release(None)
    foretold = serving_method(None, model, device, release, "bfloat16")

    hf_config = AutoConfig.from_pretrained(folder)
    claimed = Claims.override_quantization_method(CHECKPOINTS[case], None, hf_config)
    assert foretold == claimed
