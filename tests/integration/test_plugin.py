"""The plugin registers everywhere, costs nothing where unused, and claims only what it must."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

from tests.helpers import quantized_checkpoint
from tests.integration.engines import ENVIRONMENT, ROOT, EngineFailed, EngineHost
from tests.integration.reference import assert_same_scores, prompts, twin_scores
from tests.integration.schemes import gptq
from tests.tiny_models import create_tiny_model
from vllm_quantkit.schemes import SCHEMES

pytestmark = pytest.mark.engine


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, **ENVIRONMENT}
    environment.pop("VLLM_PLUGINS", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_neither_torch_nor_vllm():
    loaded = run_python(
        "import sys, vllm_quantkit, vllm_quantkit.plugin;"
        "print({'torch', 'vllm', 'triton', 'numba'} & sys.modules.keys())"
    )
    assert loaded.strip() == "set()"


def test_vllm_finds_the_plugin_and_registering_twice_changes_nothing():
    listed = run_python(
        "from vllm.plugins import load_general_plugins\n"
        "import vllm.model_executor.layers.quantization as q\n"
        "load_general_plugins()\n"
        "once = list(q.QUANTIZATION_METHODS)\n"
        "from vllm_quantkit.plugin import register\n"
        "register()\n"
        "assert once == list(q.QUANTIZATION_METHODS)\n"
        "print(*once)\n"
    )
    assert set(SCHEMES) <= set(listed.splitlines()[-1].split())


@pytest.fixture(scope="module")
def configs():
    from vllm_quantkit.integration.config import CONFIGS
    from vllm_quantkit.integration.registration import register_all

    register_all()
    return CONFIGS


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


def compressed(**weights: object) -> dict[str, object]:
    plain = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": {**plain, "group_size": 128, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def eight_bit(*, activations: bool = True, **weights: object) -> dict[str, object]:
    common = {"num_bits": 8, "type": "int", "symmetric": True, **weights}
    group = {"targets": ["Linear"], "weights": {**common, "strategy": "channel"}}
    if activations:
        group["input_activations"] = {**common, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if common["type"] == "float" else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FP8_BLOCKS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
CHECKPOINTS = {
    "quantkit": GPTQ,
    "quantkit-awq": AWQ,
    "quantkit-gptq": GPTQ,
    "quantkit-fp8": eight_bit(type="float"),
    "quantkit-fp8-block": FP8_BLOCKS,
    "quantkit-smoothquant": eight_bit(),
    "quantkit-int8": eight_bit(activations=False),
    "quantkit-int4": GPTQ,
    "quantkit-llm-int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "quantkit-kv4": {},
}
"""A checkpoint for each method; a new method is one line. Empty for one of 16-bit models only."""


def test_configs_survive_the_way_to_a_worker(configs):
    for name, cls in configs.items():
        config = cls.from_config(CHECKPOINTS[name])
        copy = pickle.loads(pickle.dumps(config))
        assert type(copy) is cls
        assert copy.rules == config.rules
        assert (copy.rules is None) == (not CHECKPOINTS[name])


@pytest.mark.parametrize("name", SCHEMES)
def test_the_users_word_claims_a_checkpoint(name, configs):
    claim = configs[name].override_quantization_method
    assert claim(CHECKPOINTS[name], name) == name
    assert claim(GPTQ, "awq") is None


ONLY_OURS = {
    "gptq, asymmetric": {**GPTQ, "sym": False},
    "gptq, 3 bits": {**GPTQ, "bits": 3},
    "gptq, 2 bits": {**GPTQ, "bits": 2},
    "gptq_v2 by name": {**GPTQ, "quant_method": "gptq_v2"},
    "compressed-tensors, 3 bits": compressed(num_bits=3),
    "compressed-tensors, 5 bits": compressed(num_bits=5),
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}
if not torch.cuda.is_available():
    ONLY_OURS |= {
        "fp8, dynamic": {"quant_method": "fp8", "activation_scheme": "dynamic"},
        "fp8, static": {"quant_method": "fp8", "activation_scheme": "static"},
        "fp8, blocks": FP8_BLOCKS,
        "compressed-tensors W8A16": eight_bit(activations=False),
    }


@pytest.mark.parametrize("case", ONLY_OURS)
def test_without_a_flag_what_vllm_refuses_is_claimed(case, configs):
    claims = {
        name: config.override_quantization_method(ONLY_OURS[case], None)
        for name, config in configs.items()
    }
    assert claims == {**dict.fromkeys(SCHEMES), "quantkit": "quantkit"}


VLLMS_OWN = {
    "awq": AWQ,
    "gptq, symmetric 4 bits": GPTQ,
    "compressed-tensors W4A16": compressed(),
    "compressed-tensors W4A16, asymmetric": compressed(symmetric=False),
    "compressed-tensors W8A8": eight_bit(),
    "compressed-tensors FP8 per channel and token": eight_bit(type="float"),
    "unknown": {"quant_method": "other"},
    "malformed": {**GPTQ, "bits": None},
}


@pytest.mark.parametrize("case", VLLMS_OWN)
def test_without_a_flag_what_vllm_serves_is_left_to_it(case, configs):
    for config in configs.values():
        assert config.override_quantization_method(VLLMS_OWN[case], None) is None


def test_act_order_is_claimed_where_vllm_dropped_it(configs):
    """Until 0.29 it is served there."""
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig

    dropped = "has_g_idx" not in MPLinearLayerConfig.__dataclass_fields__
    claimed = configs["quantkit"].override_quantization_method({**GPTQ, "desc_act": True}, None)
    assert claimed == ("quantkit" if dropped else None)


def test_act_order_asymmetric_gptq_needs_no_flag(tmp_path, engines: EngineHost):
    model = create_tiny_model("llama", tmp_path / "model")
    scheme = gptq(4, 64, symmetric=False, act_order=True)
    pair = quantized_checkpoint(model, scheme, tmp_path / "pair")
    asked = prompts()

    result = engines.run(pair.quantized, None, [{"op": "score", "prompts": asked}])

    assert any(line.startswith("INFO: quantkit: 8 layers run ") for line in result.log)
    assert_same_scores(result.answers[0], twin_scores(pair.twin, asked))


def test_a_method_that_is_not_served_is_refused_in_a_sentence(tmp_path, engines: EngineHost):
    model = create_tiny_model("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "nonesuch"}
    (model / "config.json").write_text(json.dumps(config))

    with pytest.raises(EngineFailed) as refusal:
        engines.run(model, "quantkit", [])

    assert "quant_method 'nonesuch' is not served by quantkit" in str(refusal.value)
    assert "Drop --quantization" in str(refusal.value)
