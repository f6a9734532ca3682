"""Layers, ranks and bytes of models by their configs alone, against published figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny_models import create_tiny_model
from vllm_quantkit.errors import CheckpointError, ConfigError, UnsupportedScheme
from vllm_quantkit.footprint import (
    KVCache,
    Model,
    Workload,
    footprint,
    layer_groups,
    read_model,
)
from vllm_quantkit.hardware import find_device
from vllm_quantkit.options import read_options

H200, T4, CPU = (find_device(name) for name in ("h200", "t4", "cpu"))

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""https://huggingface.co/meta-llama/Llama-3.1-70B/blob/main/config.json"""

DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json with 4 of 61 blocks and 8 of
256 experts."""


def write(folder: Path, config: dict[str, object]) -> Model:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return read_model(str(folder))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Model:
    return write(tmp_path_factory.mktemp("models") / "llama", LLAMA_70B)


def test_llama_70b_has_its_published_size(llama):
    """70.55 billion parameters, 141 GB in bfloat16, 320 KiB of keys and values a token."""
    assert llama.facts.parameters == 70_553_706_496
    found = footprint(llama, method=None, device=H200)
    tables = 131072 * 128 * 2
    assert found.weight_bytes == 2 * llama.facts.parameters + tables
    assert found.kv_bytes_per_token == 320 * 1024
    assert found.free_for_cache < 0
    assert (found.cache_tokens, found.sequences) == (0, 0)


def test_ranks_have_their_share_of_every_layer(llama):
    groups = {group.name.rpartition(".")[2]: group for group in layer_groups(llama, None, tp=4)}
    assert list(groups) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"]
    shares = {
        name: (group.rank_shape.out_features, group.rank_shape.in_features)
        for name, group in groups.items()
    }
    assert shares == {
        "qkv_proj": (64 * 128 // 4 + 2 * 2 * 128, 8192),
        "o_proj": (8192, 8192 // 4),
        "gate_up_proj": (2 * 28672 // 4, 8192),
        "down_proj": (8192, 28672 // 4),
        "lm_head": (128256 // 4, 8192),
    }
    assert groups["qkv_proj"].rank_rows == (2048, 256, 256)
    assert groups["qkv_proj"].members[1] == "model.layers.0.self_attn.k_proj"
    assert (groups["o_proj"].count, groups["o_proj"].blocks[-1]) == (80, 79)
    assert groups["lm_head"].head


def test_ranks_beyond_the_heads_of_keys_repeat_them(llama):
    (qkv, *_) = layer_groups(llama, None, tp=16)
    assert qkv.rank_rows == (512, 128, 128)
    assert KVCache().token_bytes(llama.facts, 16) == KVCache().token_bytes(llama.facts, 8)
    with pytest.raises(
        UnsupportedScheme, match="among 3 tensor-parallel ranks; use one of 1, 2, 4"
    ):
        layer_groups(llama, None, tp=3)


def test_ranks_sum_to_the_whole(llama):
    one = footprint(llama, method="quantkit-int4", device=H200)
    four = footprint(llama, method="quantkit-int4", device=H200, tp=4)
    norms_and_tables = 2 * 161 * 8192 + 131072 * 128 * 2
    assert 4 * (four.weight_bytes - norms_and_tables) == one.weight_bytes - norms_and_tables
    # Codes of 4 bits, and a word of 32 bits for a group of 128 on a GPU.
    parameters = 80 * (8192 * (10240 + 8192 + 57344) + 28672 * 8192)
    assert one.linear_bytes == parameters // 2 + parameters // 128 * 4
    assert one.weight_bytes_16bit == 2 * llama.facts.parameters + 131072 * 128 * 2


def test_cache_of_4_and_8_bits(llama):
    assert KVCache(dtype="fp8").token_bytes(llama.facts) == 160 * 1024
    assert KVCache(dtype="int4").token_bytes(llama.facts) == 80 * 8 * 140
    skipped = KVCache(dtype="int4", skip_layers=(0, 79)).token_bytes(llama.facts)
    assert skipped == 78 * 8 * 140 + 2 * 8 * 128 * 2 * 2


def test_what_is_left_is_cache(llama):
    workload = Workload(max_model_len=8192, memory_utilization=0.8)
    found = footprint(llama, method="quantkit-fp8", device=H200, tp=2, workload=workload)
    taken = found.weight_bytes + found.activation_bytes + found.overhead_bytes
    assert found.free_for_cache == int(0.8 * H200.memory_bytes) - taken
    assert found.cache_tokens == found.free_for_cache // (160 * 1024)
    assert found.sequences == pytest.approx(found.cache_tokens / 8192, rel=1e-4)
    given = Workload(cache_bytes=1 << 30)
    found = footprint(llama, method="quantkit-fp8", device=CPU, workload=given)
    assert found.cache_tokens == (1 << 30) // (320 * 1024)


def test_latent_attention_and_experts(tmp_path):
    """One latent of 512 + 64 values a token and layer, on every rank; experts as layers."""
    model = write(tmp_path / "deepseek", DEEPSEEK_V3)
    assert KVCache().token_bytes(model.facts, 8) == 4 * 576 * 2
    groups = {group.name: group for group in layer_groups(model, "quantkit-fp8", tp=8)}
    latent = groups["model.layers.*.self_attn.fused_qkv_a_proj"]
    assert (latent.parallel, latent.rank_rows) == ("replicated", (1536, 576))
    experts = groups["model.layers.*.mlp.experts.*.gate_up_proj"]
    assert (experts.count, experts.blocks, experts.expert) == (8, (3,), True)
    assert experts.rank_rows == (256, 256)
    assert "does not serve mixture-of-experts layers" in experts.refused
    assert groups["model.layers.*.mlp.gate"].spec is None
    assert layer_groups(model, None)[0].refused == ""


def test_windowed_layers_keep_a_window(tmp_path):
    """Gemma 3: five of six layers see 1,024 tokens; a step adds at most 2,048."""
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 2
    config = {
        **LLAMA_70B,
        "num_hidden_layers": 12,
        "sliding_window": 1024,
        "layer_types": kinds,
    }
    model = write(tmp_path / "windows", config)
    assert (model.facts.sliding_window, model.facts.windowed_layers) == (1024, 10)
    cache, layer = KVCache(), 2 * 8 * 128 * 2
    length = 100_000
    whole = cache.sequence_bytes(model.facts, length, 2048)
    assert whole == pytest.approx(layer * (2 * length + 10 * (1023 + 2048)), rel=1e-6)
    assert cache.token_bytes(model.facts) == 12 * layer


def test_a_folder_with_a_config_alone_is_as_one_with_weights(tmp_path):
    for family in ("qwen2", "phi3", "gpt2", "qwen3_moe"):
        folder = create_tiny_model(family, tmp_path / family)
        whole = read_model(str(folder))
        bare = tmp_path / f"{family}-config"
        config = json.loads((folder / "config.json").read_text())
        alone = write(bare, config)
        assert not alone.facts.from_headers
        assert alone.facts.parameters == whole.facts.parameters
        for method in (None, "quantkit-int8"):
            sizes = [footprint(m, method=method, device=T4).weight_bytes for m in (whole, alone)]
            assert sizes[0] == sizes[1], family


def test_layers_that_options_leave_alone(llama):
    options = read_options({"quantkit": {"ignore": [".*down_proj"], "layers": {".*q_proj": None}}})
    groups = {g.name.rpartition(".")[2]: g for g in layer_groups(llama, "quantkit-fp8", options)}
    assert groups["down_proj"].spec is None
    assert groups["o_proj"].spec is not None
    assert "must share a scheme" in groups["qkv_proj"].refused
    assert groups["lm_head"].spec is None


def test_methods_that_do_not_fit(llama):
    with pytest.raises(ConfigError, match="'awq' is none of vllm-quantkit's; use one of quantkit,"):
        layer_groups(llama, "awq")
    with pytest.raises(UnsupportedScheme, match="already quantised"):
        layer_groups(llama, "quantkit-awq")


BROKEN = {
    "no hidden_size": ({"hidden_size": None}, "has no hidden_size"),
    "a size that is none": ({"num_hidden_layers": "many"}, "num_hidden_layers = 'many'"),
    "a negative size": ({"vocab_size": -1}, "vocab_size = -1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_malformed_config_is_one_sentence(case, tmp_path):
    change, words = BROKEN[case]
    with pytest.raises(CheckpointError, match=words):
        write(tmp_path / "broken", {**LLAMA_70B, **change})


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        read_model(str(tmp_path))


def test_an_architecture_nobody_knows(tmp_path):
    with pytest.raises(UnsupportedScheme, match="model_type 'nonesuch'"):
        write(tmp_path / "unknown", {**LLAMA_70B, "model_type": "nonesuch"})


def test_a_truncated_file_is_named(tmp_path):
    folder = create_tiny_model("llama", tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        read_model(str(folder))
