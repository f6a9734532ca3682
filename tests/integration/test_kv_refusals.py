"""What an INT4 KV cache refuses, in a sentence that says what to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.model_executor.layers.attention import Attention, EncoderOnlyAttention, MLAAttention
from vllm.platforms import current_platform

from tests.integration.engines import EngineFailed, EngineHost
from tests.tiny_models import create_tiny_model
from vllm_quantkit.errors import ConfigError, UnsupportedScheme
from vllm_quantkit.integration.kv_refusals import (
    check_cache_dtype,
    check_causal,
    check_engine,
    check_layer,
)
from vllm_quantkit.kv_rules import SERVED_ON_CPU
from vllm_quantkit.options import KVCacheOptions, read_options
from vllm_quantkit.schemes import get_method


def config(**parts: Any) -> SimpleNamespace:
    """Of an engine that is served, but for `parts` named `section__field`."""
    sections = {
        "parallel_config": {"decode_context_parallel_size": 1},
        "model_config": {"is_hybrid": False},
        "cache_config": {},
    }
    whole: dict[str, Any] = {"kv_transfer_config": None}
    for name, value in parts.items():
        section, _, key = name.partition("__")
        sections[section] = {**sections[section], key: value} if key else value
    whole |= {n: SimpleNamespace(**s) if isinstance(s, dict) else s for n, s in sections.items()}
    return SimpleNamespace(**whole)


def layer(kind: type = Attention, **parts: Any) -> Any:
    """An attention layer that is served, but for `parts`."""
    made = kind.__new__(kind)
    fields = {
        "attn_type": "decoder",
        "head_size": 64,
        "head_size_v": 64,
        "use_mm_prefix": False,
        "impl": SimpleNamespace(alibi_slopes=None),
    }
    made.__dict__.update({**fields, **parts})
    return made


def test_what_is_served_passes():
    check_engine(config())
    check_layer(layer(), "model.layers.0.self_attn.attn")
    check_causal(True, ["model.layers.0.self_attn.attn"])


ENGINES = {
    "decode_context_parallel_size = 2": config(parallel_config__decode_context_parallel_size=2),
    "prefill_context_parallel_size = 4": config(parallel_config__prefill_context_parallel_size=4),
    "kv-sharing-fast-prefill": config(cache_config__kv_sharing_fast_prefill=True),
    "recurrent layers": config(model_config__is_hybrid=True),
    "KV connector NixlConnector": SimpleNamespace(
        **{
            **config().__dict__,
            "parallel_config": SimpleNamespace(decode_context_parallel_size=1),
            "kv_transfer_config": SimpleNamespace(kv_connector="NixlConnector"),
        }
    ),
}


@pytest.mark.parametrize("words", ENGINES)
def test_engines(words):
    with pytest.raises(UnsupportedScheme, match=words):
        check_engine(ENGINES[words])


LAYERS = {
    "latent attention": layer(MLAAttention),
    "is encoder_only attention": layer(EncoderOnlyAttention, attn_type="encoder_only"),
    "is encoder_decoder attention": layer(attn_type="encoder_decoder"),
    "uses ALiBi": layer(impl=SimpleNamespace(alibi_slopes=[1.0])),
    "keys of 64 and values of 48": layer(head_size_v=48),
    "heads of 512 dimensions": layer(head_size=512, head_size_v=512),
    "images in both directions": layer(use_mm_prefix=True),
    "is a EncoderOnlyAttention": layer(EncoderOnlyAttention),
}


@pytest.mark.parametrize("words", LAYERS)
def test_layers(words):
    with pytest.raises(UnsupportedScheme, match=words) as refusal:
        check_layer(LAYERS[words], "model.layers.0.self_attn.attn")
    assert "model.layers.0.self_attn.attn" in str(refusal.value)


def test_steps_that_are_not_causal():
    with pytest.raises(UnsupportedScheme, match="not causal"):
        check_causal(False, ["model.layers.0.self_attn.attn"])


INT4 = KVCacheOptions(dtype="int4")


def test_words_that_contradict_each_other():
    with pytest.raises(ConfigError, match=r"fp8 contradicts kv_cache.dtype = .int4."):
        check_cache_dtype("fp8", INT4, "quantkit-awq", int4=False)
    with pytest.raises(ConfigError, match="bfloat16 contradicts --quantization quantkit-kv4"):
        check_cache_dtype("bfloat16", KVCacheOptions(), "quantkit-kv4", int4=True)
    with pytest.raises(ConfigError, match=r"kv_cache.skip_layers = .\(0,\). means nothing"):
        check_cache_dtype("auto", KVCacheOptions(skip_layers=(0,)), "quantkit-awq", int4=False)
    check_cache_dtype("int4_per_token_head", INT4, "quantkit-awq", int4=False)
    check_cache_dtype("fp8", KVCacheOptions(), "quantkit-awq", int4=False)


@pytest.mark.skipif(not current_platform.is_cpu(), reason="on GPUs these are vLLM's business")
@pytest.mark.parametrize(
    "dtype", ["int8_per_token_head", "fp8_per_token_head", "turboquant_4bit_nc", "nvfp4"]
)
def test_words_that_a_cpu_would_misread(dtype):
    assert dtype not in SERVED_ON_CPU
    with pytest.raises(UnsupportedScheme, match=f"{dtype} is not served on CPUs"):
        check_cache_dtype(dtype, KVCacheOptions(), "quantkit-int8", int4=False)


def test_a_quantised_checkpoint_is_told_its_flags():
    with pytest.raises(UnsupportedScheme) as refusal:
        get_method("quantkit-kv4").rules({"quant_method": "awq"})
    assert "--quantization quantkit --kv-cache-dtype int4_per_token_head" in str(refusal.value)


def test_options_name_the_key_and_what_is_allowed():
    with pytest.raises(ConfigError, match=r"kv_cache.key_group = 48.*allowed keys are calibration"):
        read_options({"quantkit": {"kv_cache": {"key_group": 48}}})
    with pytest.raises(ConfigError, match="there is no folder 'nonesuch'"):
        read_options({"quantkit": {"kv_cache": {"calibration": "nonesuch"}}})


@pytest.mark.engine
def test_the_engine_says_so(tmp_path, engines: EngineHost):
    model = create_tiny_model("llama", tmp_path / "model")
    with pytest.raises(EngineFailed, match="int8_per_token_head is not served on CPUs"):
        engines.run(model, "quantkit-int8", [], kv_cache_dtype="int8_per_token_head")
    with pytest.raises(EngineFailed, match="fp8 contradicts --quantization quantkit-kv4"):
        engines.run(model, "quantkit-kv4", [], kv_cache_dtype="fp8")
    latent = create_tiny_model("deepseek_v2", tmp_path / "latent")
    with pytest.raises(EngineFailed, match="MLA"):  # vLLM 0.27 says so itself, on CPUs
        engines.run(latent, "quantkit-kv4", [])
