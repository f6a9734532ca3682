"""Which layers cost what: swaps are exact, and the approximation agrees with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from quantkit_kernels.act_quant import RowQuantizer
from tests.evaluate.conftest import INT4
from tests.written_models import write_model
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.evaluate.by_layer import measure_by_layer
from vllm_quantkit.evaluate.hf_model import ServedLinear
from vllm_quantkit.evaluate.layer_pairs import fit_scales, group_layers, make_pair
from vllm_quantkit.evaluate.quality import SILENT, Windows, measure_base, measure_quality
from vllm_quantkit.evaluate.sensitivity import LayerSensitivity, SensitivityMethod

DEMO = Path(__file__).parents[2] / "examples/tiny-lm"

EXACT = 1e-6
"""Nats for each token: float32 logits of the same weights."""

RANKS = 0.9
"""Spearman's correlation of the approximation with what it stands for, on two windows; 0.97 or more
on four."""


@pytest.fixture(scope="module")
def windows() -> Windows:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "bf16")
    text = (DEMO / "data/held_out.txt").read_text()
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Windows(tuple((0, *ids[255 * i : 255 * i + 255]) for i in range(2)), "held_out.txt")


def measured(model: EngineSpec, windows: Windows, method: SensitivityMethod) -> dict[str, float]:
    base = EngineSpec(str(DEMO / "bf16"))
    found = measure_by_layer(model, base, windows, method, terminal=SILENT)
    return {row.group: row.kl for row in found}


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


def test_the_approximation_ranks_layers_as_quantising_them_does(windows: Windows) -> None:
    awq = EngineSpec(str(DEMO / "awq"))
    exact = measured(awq, windows, "exact quantise")
    approximate = measured(awq, windows, "fisher approximation")
    assert exact.keys() == approximate.keys()
    assert len(exact) == 4 * 4 + 4
    both = [[values[name] for name in exact] for values in (exact, approximate)]
    assert np.corrcoef(*map(ranks, both))[0, 1] > RANKS
    assert np.corrcoef(*both)[0, 1] > RANKS


def test_restoring_a_group_is_the_model_without_it(
    llama: Path, quantised: Path, windows: Windows, tmp_path: Path
) -> None:
    """Against a checkpoint in which the group was never quantised."""
    base, group = EngineSpec(str(llama)), "model.layers.1.mlp.gate_up_proj"
    few = Windows(tuple(tuple(token % 500 for token in row[:64]) for row in windows.rows), "text")
    found = measure_by_layer(
        EngineSpec(str(quantised)), base, few, "exact restore", terminal=SILENT
    )
    spared = ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    other = write_model(llama, tmp_path / "o", lambda name: None if name in spared else INT4).folder
    stored = measure_base(base, few, backend="hf")
    whole, without = (
        measure_quality(EngineSpec(str(folder)), stored, backend="hf").divergence.value
        for folder in (quantised, other)
    )
    row = next(row for row in found if row.group == group)
    assert row.members == spared
    assert row.kl == pytest.approx(whole - without, abs=EXACT)
    assert row.bits == 4
    blocks = [row for row in found if row.is_block]
    assert [row.group for row in blocks] == sorted(
        (row.group for row in blocks),
        key=lambda name: -next(r.kl for r in blocks if r.group == name),
    )


def test_quantising_everything_in_blocks_adds_up_roughly(
    llama: Path, quantised: Path, windows: Windows
) -> None:
    """Blocks' errors hardly meet: their costs add up to the whole's within a third."""
    few = Windows(tuple(tuple(token % 500 for token in row[:64]) for row in windows.rows), "text")
    base = EngineSpec(str(llama))
    found = measure_by_layer(
        EngineSpec(str(quantised)), base, few, "exact quantise", terminal=SILENT
    )
    stored = measure_base(base, few, backend="hf")
    whole = measure_quality(EngineSpec(str(quantised)), stored, backend="hf").divergence.value
    assert sum(row.kl for row in found if row.is_block) == pytest.approx(whole, rel=1 / 3)


def test_a_plain_model_has_nothing_to_attribute(llama: Path, windows: Windows) -> None:
    spec = EngineSpec(str(llama))
    with pytest.raises(ConfigError, match="no quantised linear layer"):
        measure_by_layer(spec, spec, windows, "exact restore", terminal=SILENT)


def random_layer(bias: bool = False) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(96, 64, bias=bias)


def test_unscaled_weights_have_no_scales() -> None:
    weight = random_layer().weight.detach()
    error = 0.1 * weight.std() * torch.randn(weight.shape)
    r, c = fit_scales(weight, weight + error)
    assert bool((r == 1).all())
    assert bool((c == 1).all())


@pytest.mark.parametrize("rows", [False, True])
def test_folded_scales_are_found(rows: bool) -> None:
    weight = random_layer().weight.detach()
    r = torch.rand(64) + 0.5 if rows else torch.ones(64)
    c = torch.rand(96) + 0.5
    scaled = r[:, None] * weight * c
    noise = 0.005 * scaled.std() * torch.randn(scaled.shape)
    found_r, found_c = fit_scales(weight, scaled + noise)
    # Noise is 2 % of the smallest channels, and 0.25 % of a scale that is fitted to 64 of them.
    assert torch.allclose(found_r[:, None] * found_c, r[:, None] * c, rtol=0.02)
    if not rows:
        assert bool((found_r == 1).all())


@pytest.mark.parametrize("quantizer", [None, RowQuantizer("int8")])
def test_each_form_stands_in_the_others_place(quantizer: RowQuantizer | None) -> None:
    """y' = r y of x' = x / c: scales that a quantiser folds into the neighbours."""
    plain = random_layer(bias=True)
    r, c = torch.rand(64) + 0.5, torch.rand(96) + 0.5
    weight = (r[:, None] * plain.weight * c).detach()
    served = ServedLinear(weight, (r * plain.bias).detach(), quantizer)
    pair = make_pair("layer", plain, served)
    x = torch.randn(5, 96)
    with torch.no_grad():
        assert torch.allclose(pair.restored(x / c), r * plain(x), atol=1e-4)
        assert torch.allclose(pair.quantised(x), served(x / c) / r, atol=1e-4)


def test_fused_layers_share_a_group() -> None:
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"] + ["model.layers.1.mlp.up_proj"]
    layer = random_layer()
    served = ServedLinear(layer.weight.detach(), None, None)
    groups = group_layers([make_pair(name, layer, served) for name in names])
    assert [(group.name, len(group.pairs), group.is_block) for group in groups] == [
        ("model.layers.0.self_attn.qkv_proj", 3, False),
        ("model.layers.0.self_attn.o_proj", 1, False),
        ("model.layers.1.mlp.gate_up_proj", 1, False),
        ("model.layers.0", 4, True),
        ("model.layers.1", 1, True),
    ]


def test_a_sensitivity_survives_json() -> None:
    row = LayerSensitivity(group="g", members=("a",), kl=-0.1, method="exact restore", bits=4)
    assert LayerSensitivity.model_validate_json(row.model_dump_json()) == row
