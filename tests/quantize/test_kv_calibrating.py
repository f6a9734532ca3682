"""Calibrating the KV cache of whole models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from tests.tiny_models import MOE_MODELS, OTHER_MODELS, TINY_MODELS, create_tiny_model
from vllm_quantkit.errors import ConfigError, UnsupportedScheme
from vllm_quantkit.kv_calibration import KVCalibration, read_kv_calibration, write_kv_calibration
from vllm_quantkit.quantize.calibration import TokenSet, TokenSets
from vllm_quantkit.quantize.kv_cache import calibrating
from vllm_quantkit.quantize.kv_cache.attention import AttentionCall, observed_attention
from vllm_quantkit.quantize.kv_cache.calibrating import (
    KVOptions,
    calibrate_kv_cache,
    kv_options,
)
from vllm_quantkit.quantize.kv_cache.moments import CHOICES
from vllm_quantkit.quantize.kv_cache.telling import (
    HEADINGS,
    cache_bytes,
    closing_lines,
    serve_command,
    table_lines,
    warnings,
)
from vllm_quantkit.quantize.model.model_shell import ModelShell
from vllm_quantkit.quantize.progress import Silent
from vllm_quantkit.quantize.run_options import RunOptions

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 24,
}

FAMILIES = sorted(
    {*TINY_MODELS, *MOE_MODELS, *OTHER_MODELS} - {"gpt2", "deepseek_v2", "deepseek_v3"}
)

WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}


def token_sets(samples: int, tokens: int, *, padded: bool = False) -> TokenSets:
    ids = torch.randint(2, 500, (samples + 2, tokens), generator=torch.Generator().manual_seed(0))
    mask = None
    if padded:
        lengths = tokens - torch.arange(samples) % 5
        mask = (torch.arange(tokens) < lengths[:, None]).long()
    return TokenSets(TokenSet(ids[2:], mask, "text"), TokenSet(ids[:2], None, "text"), ())


def calibrated(folder: Path, sets: TokenSets, **options: Any) -> KVCalibration:
    run = RunOptions(precision="float32", batch_tokens=128)
    return calibrate_kv_cache(folder, sets, run=run, options=KVOptions(**options), watcher=Silent())


def attended(folder: Path, tokens: TokenSet) -> list[list[Tensor]]:
    """Each layer's queries as attention gets them, and keys and values as the model's own cache
    keeps them, float64 [tokens, heads, size]."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    found: list[list[list[Tensor]]] = [[[], [], []] for _ in model.model.layers]
    owner = sys.modules[type(model.model.layers[0].self_attn).__module__]
    compute = owner.eager_attention_forward

    def listen(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        found[module.layer_idx][0].append(query[0].transpose(0, 1))
        return compute(module, query, *args, **kwargs)

    mask = tokens.attention_mask
    for index, ids in enumerate(tokens.input_ids):
        kept = ids if mask is None else ids[mask[index].bool()]
        cache = DynamicCache()
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, "eager_attention_forward", listen)
            model(input_ids=kept[None], past_key_values=cache, use_cache=True)
        for (_, keys, values), layer in zip(found, cache.layers, strict=True):
            keys.append(layer.keys[0].transpose(0, 1))
            values.append(layer.values[0].transpose(0, 1))
    return [[torch.cat(parts) for parts in layer] for layer in found]


@pytest.mark.parametrize(
    ("family", "padded"), [("llama", True), *((family, False) for family in FAMILIES)]
)
def test_moments_are_those_of_the_models_own_cache(
    family: str, padded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(calibrating, "_best", lambda errors: "shift+scale")
    folder = create_tiny_model(family, tmp_path / "model", dtype=torch.float32, **SMALL)
    sets = token_sets(6, 40, padded=padded)
    found = calibrated(folder, sets, bound=1)
    expected = attended(folder, sets.calibration)
    assert list(found.layers) == [f"model.layers.{i}.self_attn" for i in range(2)]
    for layer, (queries, keys, values) in zip(found.layers.values(), expected, strict=True):
        assert (layer.record.kv_heads, layer.record.head_size) == keys.shape[1:]
        # a forward in float32 against one in float64; keys are about 1
        scales = torch.tensor([layer.k_scale, layer.v_scale], dtype=torch.float64)
        largest = torch.stack([keys.abs().max(), values.abs().max()]) / 448
        torch.testing.assert_close(scales, largest, rtol=1e-4, atol=0)
        assert layer.shift is not None
        assert layer.scale is not None
        torch.testing.assert_close(layer.shift.double(), keys.mean(0), rtol=0, atol=1e-4)
        # query heads 2i and 2i + 1 read KV head i
        power = queries.square().mean(0).unflatten(0, (keys.shape[1], -1)).mean(1)
        root = (keys.std(0, correction=0) / power.sqrt()).sqrt().log()
        ratio = (root - root.mean(-1, keepdim=True)).exp()
        torch.testing.assert_close(layer.scale.double(), ratio, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", {}),
        ("gemma2", {}),
        ("gemma3", {}),
        ("qwen2", {"num_key_value_heads": 1}),
        ("qwen2", {"num_key_value_heads": 4, **WINDOWED}),
    ],
    ids=["sdpa", "softcap", "window", "one-kv-head", "as-many-kv-heads"],
)
def test_observed_attention_computes_what_it_always_does(family, extra, tmp_path: Path):
    folder = create_tiny_model(family, tmp_path / "model", dtype=torch.float32, **SMALL | extra)
    shell, ids = ModelShell.open(folder), token_sets(1, 50).held_out.input_ids
    calls: list[AttentionCall] = []
    with shell.open_ends():
        hidden, how = shell.enter(ids, None)
    for index in range(2):
        with shell.block(index) as block, torch.no_grad():
            plain = how[index].run(block, hidden)
            with observed_attention(block, lambda name, call: calls.append(call)):
                seen = how[index].run(block, hidden)
            assert torch.equal(how[index].run(block, hidden), plain)
        assert torch.equal(seen, plain)
    kv_heads = extra.get("num_key_value_heads", 2)
    assert [tuple(call.key.shape) for call in calls] == [(2, kv_heads, 50, 16)] * 2
    last = [call.visible(1, torch.tensor([49]))[0].sum() for call in calls]
    windowed = family.startswith("gemma") or "layer_types" in extra
    assert last == ([24, 50] if windowed else [50, 50])
    assert calls[0].softcap == (50.0 if family == "gemma2" else None)


class OddAttention(nn.Module):
    """Attention that asks nobody how to compute."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def test_attention_that_cannot_be_seen_is_refused():
    block = nn.ModuleDict({"self_attn": OddAttention()})
    with (
        pytest.raises(UnsupportedScheme, match="OddAttention does not call its attention through"),
        observed_attention(block, lambda name, call: None),
    ):
        block["self_attn"](torch.ones(1))


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_is_refused(family: str, tmp_path: Path):
    folder = create_tiny_model(family, tmp_path / "model")
    with pytest.raises(UnsupportedScheme, match=f"'{family}' cache 64 latent dimensions, no keys"):
        calibrated(folder, token_sets(2, 20))


SLOW, FAST = (50, 55, 58, 60), tuple(range(4, 44, 4))
"""Of the 64 pairs of dimensions that RoPE turns: by less than 0.01 in 448 tokens, and by more."""


def biased(folder: Path, dimensions: tuple[int, ...], size: float) -> Path:
    """A Qwen2 whose second layer has a large bias of keys, as some of that family have."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    create_tiny_model("qwen2", folder, **sizes, **heads, **rope)
    tensors = load_file(folder / "model.safetensors")
    bias = tensors["model.layers.1.self_attn.k_proj.bias"]
    for place in dimensions:
        bias[place], bias[place + 64] = size * (-1) ** place, 0.43 * size
    assert 600 < float(bias.float().norm()) < 900
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_mean_takes_a_bias_on_slow_dimensions_away(tmp_path: Path):
    found = calibrated(biased(tmp_path / "model", SLOW, 280), token_sets(8, 448))
    healthy, record = (layer.record for layer in found.layers.values())
    assert healthy.calibrated.output < 0.15
    assert record.uncalibrated.output > 0.5
    assert record.calibrated.output < 0.15
    assert record.calibrated.softmax <= 0.15
    assert (record.dtype, record.treatment != "none") == ("int4", True)
    assert any(
        "model.layers.1.self_attn moves with position" in warning and "448 tokens" in warning
        for warning in warnings(found)
    )


def test_a_layer_that_nothing_saves_keeps_16_bits(tmp_path: Path):
    folder = biased(tmp_path / "model", FAST, 250)
    found = calibrated(folder, token_sets(8, 448))
    healthy, record = (layer.record for layer in found.layers.values())
    assert (healthy.dtype, record.dtype) == ("int4", "auto")
    assert record.calibrated.output > 0.25
    # heads of 128: 128 + 2 (4 + 2) bytes in 4 bits, 512 in 16
    assert cache_bytes(found.summary) == (140 + 512, 1024)
    said = "\n".join(closing_lines(found, "M", folder, tmp_path / "kv"))
    assert "1 of 2 layers keep a cache of 16 bits" in said
    assert "output error is beyond 25.0%: model.layers.1.self_attn." in said
    assert "652 bytes for each token, 1.57 times less than the 1,024 of 16 bits" in said
    assert calibrated(folder, token_sets(8, 448), bound=0.9).layers.keys() == found.layers.keys()


def test_the_table_names_every_layer_and_what_it_gets(tmp_path: Path):
    folder = biased(tmp_path / "model", FAST, 250)
    heading, first, second = table_lines(calibrated(folder, token_sets(8, 448)))
    assert heading.split() == list(HEADINGS)
    assert first.startswith("model.layers.0.self_attn  4 bits   ")
    assert second.startswith("model.layers.1.self_attn  16 bits  ")
    assert len(heading) == len(first) == len(second)


def test_halves_that_disagree_are_warned_of(tmp_path: Path):
    """One sample in each half, whose means have little to do with each other."""
    folder = biased(tmp_path / "model", SLOW, 280)
    said = warnings(calibrated(folder, token_sets(2, 12)))
    assert "disagree about the keys of model.layers.1.self_attn" in said[0]
    assert "give more samples (--samples)" in said[0]


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_the_same_text_gives_the_same_bytes(place: Any, llama: Path, tmp_path: Path):
    sets = token_sets(4, 30)
    for name, run in (("x", RunOptions()), ("y", RunOptions(hidden_states=place))):
        found = calibrate_kv_cache(
            llama, sets, run=run, options=KVOptions(), watcher=Silent(), model_name="me"
        )
        write_kv_calibration(found, tmp_path / name)
    for path in (tmp_path / "x").iterdir():
        assert path.read_bytes() == (tmp_path / "y" / path.name).read_bytes()
    assert read_kv_calibration(tmp_path / "x").summary == found.summary
    assert found.summary.model == "me"


@pytest.mark.parametrize(
    ("errors", "chosen"),
    [
        ((0.1, 0.099, 0.099), "none"),
        ((0.1, 0.09, 0.0895), "shift"),
        ((0.1, 0.09, 0.088), "shift+scale"),
        ((0.1, 0.099, 0.098), "shift+scale"),
        ((0.1, 0.2, 0.05), "shift+scale"),
        ((0.0, 0.0, 0.0), "none"),
    ],
)
def test_a_treatment_must_be_worth_it(errors: tuple[float, ...], chosen: str):
    assert calibrating._best(dict(zip(CHOICES, errors, strict=True))) == chosen


@pytest.mark.parametrize("bound", [0.0, -1.0, 1.5, float("nan")])
def test_a_bound_that_is_no_share_is_refused(bound: float):
    with pytest.raises(ConfigError, match=f"--bound {bound}: .* at most 1; the default is 0.25"):
        kv_options(bound)


def test_inside_the_model_a_calibration_is_found_by_itself(tmp_path: Path):
    inside = serve_command("M", tmp_path, tmp_path / "kv_cache")
    assert inside == "vllm serve M --quantization quantkit-kv4"
    beside = serve_command("M", tmp_path, tmp_path / "other")
    option = f'\'{{"quantkit": {{"kv_cache": {{"calibration": "{tmp_path}/other"}}}}}}\''
    assert beside == f"{inside} --additional-config {option}"
