"""What is wrong with a checkpoint or a flag is said in one sentence that names it and the fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from tests.helpers import quantized_checkpoint
from tests.integration.engines import EngineFailed, EngineHost
from tests.integration.schemes import awq, gptq
from tests.tiny_models import create_tiny_model

pytestmark = pytest.mark.engine

LAYER = "model.layers.0.self_attn.o_proj"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """An act-order GPTQ checkpoint with nothing wrong."""
    folder = tmp_path_factory.mktemp("sound")
    scheme = gptq(4, 64, symmetric=False, act_order=True)
    model = create_tiny_model("llama", folder / "model")
    return quantized_checkpoint(model, scheme, folder / "pair").quantized


@pytest.fixture
def spoil(sound, tmp_path) -> Callable[[Callable[[Tensors], Any]], Path]:
    """Copies the sound checkpoint with its tensors changed."""

    def spoilt(change: Callable[[Tensors], Any]) -> Path:
        out = tmp_path / "spoilt"
        shutil.copytree(sound, out)
        tensors = load_file(out / "model.safetensors")
        change(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return out

    return spoilt


def set_config(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= keys
    (folder / "config.json").write_text(json.dumps(config))


def refusal(engines: EngineHost, *args: Any, **options: Any) -> str:
    """The sentence with which an engine refuses to start."""
    with pytest.raises(EngineFailed) as failure:
        engines.run(*args, [], **options)
    return str(failure.value)


SPOILT: dict[str, tuple[Callable[[Tensors], Any], tuple[str, ...]]] = {
    "missing": (
        lambda t: t.pop(f"{LAYER}.qzeros"),
        (f"{LAYER}.qzeros is missing", "Add the tensor"),
    ),
    "misshaped": (
        lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"][1:].contiguous()}),
        (f"{LAYER}.scales in ", "[3, 256], but [4, 256]", "save the model again"),
    ),
    "mistyped": (
        lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].long()}),
        (f"{LAYER}.qweight in ", "int64, but torch.int32", "save the model again"),
    ),
    "not finite": (
        lambda t: t[f"{LAYER}.scales"][2].fill_(torch.nan),
        (f"CheckpointError: {LAYER}.scales", "the scale nan at [0, 2]", "again"),
    ),
    "group out of range": (
        lambda t: t[f"{LAYER}.g_idx"].add_(1),
        (f"CheckpointError: layer {LAYER}", "spans 1 .. 4", "groups 0 .. 3", "again"),
    ),
    "bias without a place": (
        lambda t: t.update({f"{LAYER}.bias": torch.ones(256)}),
        (f"CheckpointError: {LAYER}.bias", "is not zero", "save the model without it"),
    ),
    "not in the model": (
        lambda t: t.update({n.replace(LAYER, "model.extra"): v.clone() for n, v in t.items()}),
        ("CheckpointError: no layer of the model takes model.extra", "ignore_layers"),
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_checkpoint_is_refused(fault, spoil, engines):
    change, expected = SPOILT[fault]

    sentence = refusal(engines, spoil(change), "quantkit-gptq")

    for part in expected:
        assert part in sentence


def test_a_tensor_in_two_files_is_refused(spoil, engines):
    folder = spoil(lambda tensors: None)
    name = f"{LAYER}.qweight"
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensors[name]}, folder / "other.safetensors", metadata={"format": "pt"})

    sentence = refusal(engines, folder, "quantkit-gptq")

    assert f"CheckpointError: {name} occurs twice in the checkpoint; remove the" in sentence


def test_a_truncated_file_is_refused(spoil, engines):
    file = spoil(lambda tensors: None) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])

    sentence = refusal(engines, file.parent, "quantkit-gptq")

    assert f"{file} is truncated or corrupt" in sentence
    assert "Download the file again" in sentence


def test_ignore_layers_lets_the_model_do_without_a_layer(spoil, engines):
    folder = spoil(SPOILT["not in the model"][0])
    options = {"quantkit": {"ignore_layers": [r"model\.extra"]}}

    engines.run(folder, "quantkit-gptq", [], additional_config=options)


def test_a_zero_bias_without_a_place_is_no_fault(spoil, engines):
    folder = spoil(lambda tensors: tensors.update({f"{LAYER}.bias": torch.zeros(256)}))

    engines.run(folder, "quantkit-gptq", [])


def test_an_unknown_option_is_refused(sound, engines):
    sentence = refusal(
        engines, sound, "quantkit-gptq", additional_config={"quantkit": {"ignore_layer": []}}
    )

    assert "ConfigError: --additional-config quantkit: ignore_layer" in sentence
    assert "allowed keys are activation_scales, " in sentence


def test_a_16_bit_model_is_refused(tmp_path, engines):
    model = create_tiny_model("llama", tmp_path / "model")

    sentence = refusal(engines, model, "quantkit")

    assert "--quantization quantkit serves checkpoints that are already quantised" in sentence
    assert "Quantise the model first" in sentence


def test_a_16_bit_model_is_refused_by_a_method_with_config_files_of_its_own(tmp_path, engines):
    """vLLM looks for such a file itself, and says so itself."""
    model = create_tiny_model("llama", tmp_path / "model")

    sentence = refusal(engines, model, "quantkit-awq")

    assert "Cannot find the config file for quantkit-awq" in sentence


def test_a_config_in_a_file_of_its_own_is_read(sound, tmp_path, engines):
    """Early GPTQ checkpoints keep it beside config.json, without the method's name."""
    folder = shutil.copytree(sound, tmp_path / "early")
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    del quantization["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(quantization))

    log = engines.run(folder, "quantkit-gptq", []).log

    assert any("8 layers run" in line for line in log)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"bits": 5}, ("'bits' is 5", "AWQ with bits 4", "Quantise again with bits 4")),
        ({"group_size": 0}, ("'group_size' is 0", "a positive integer, or -1", "Correct it")),
    ],
    ids=["bits", "group_size"],
)
def test_a_config_that_means_nothing_served_is_refused(keys, parts, tmp_path, engines):
    model = create_tiny_model("llama", tmp_path / "model")
    folder = quantized_checkpoint(model, awq(64), tmp_path / "pair").quantized
    set_config(folder, **keys)

    sentence = refusal(engines, folder, "quantkit-awq")

    for part in parts:
        assert part in sentence


def test_different_schemes_in_one_merged_layer_are_refused(tmp_path, engines):
    model = create_tiny_model("llama", tmp_path / "model")
    scheme, q_proj = gptq(4, 64, symmetric=True), "model.layers.1.self_attn.q_proj"
    folder = quantized_checkpoint(model, scheme, tmp_path / "pair", ignore=(q_proj,)).quantized

    sentence = refusal(engines, folder, "quantkit-gptq")

    assert "UnsupportedScheme: vLLM merges the layers of model.layers.1.self_attn.qkv" in sentence
    assert f"{q_proj}: 16 bits" in sentence
    assert "leave all of them in 16 bits" in sentence


def test_a_mixture_of_experts_is_refused(tmp_path, engines):
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True},
    )
    model = create_tiny_model("llama", tmp_path / "model")
    MixtralForCausalLM(config).save_pretrained(model)

    sentence = refusal(engines, model, "quantkit-gptq")

    assert "UnsupportedScheme: quantkit-gptq does not serve mixture-of-experts" in sentence
    assert "drop --quantization" in sentence
