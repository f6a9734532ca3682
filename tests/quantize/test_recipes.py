"""Recipes: what a user writes, what every layer gets, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.quantize.recipes.presets import KEEP, PRESETS, LayerOptions
from vllm_quantkit.quantize.recipes.recipe_file import Recipe, make_recipe, read_recipe


@pytest.mark.parametrize("name", PRESETS)
def test_a_scheme_alone_is_a_recipe(name: str) -> None:
    assert make_recipe({"scheme": name}).layer_recipe("model.layers.0.x") == PRESETS[name]


def test_options_change_the_scheme() -> None:
    keys = {"scheme": "gptq", "bits": 3, "group_size": 32, "symmetric": False, "act_order": "group"}
    recipe = make_recipe(keys | {"damping": 0.05}).layer_recipe("x")
    assert recipe is not None
    weight = recipe.weight
    assert (weight.bits, weight.group_size, weight.symmetric) == (3, 32, False)
    assert weight.act_order
    assert recipe.order == "group"
    assert recipe.damping == 0.05


@pytest.mark.parametrize(
    ("scales", "group_size", "scale_rows"),
    [("tensor", -1, -1), ("channel", -1, 1), ("block", 128, 128)],
)
def test_scales_of_fp8(scales: str, group_size: int, scale_rows: int) -> None:
    recipe = make_recipe({"scheme": "fp8", "scales": scales}).layer_recipe("x")
    assert recipe is not None
    assert recipe.activation is not None
    assert (recipe.weight.group_size, recipe.weight.scale_rows) == (group_size, scale_rows)
    assert recipe.activation.group_size == (128 if scales == "block" else -1)


def test_activations_can_be_chosen() -> None:
    static = make_recipe({"scheme": "smoothquant", "activations": "static"}).layer_recipe("x")
    none = make_recipe({"scheme": "fp8", "activations": "none"}).layer_recipe("x")
    dynamic = make_recipe({"scheme": "int8", "activations": "dynamic"}).layer_recipe("x")
    assert static is not None
    assert static.activation is not None
    assert not static.activation.dynamic
    assert none is not None
    assert none.activation is None
    assert dynamic is not None
    assert dynamic.activation is not None
    assert dynamic.activation.code == "int8"


def test_the_first_rule_that_matches_wins() -> None:
    rules = [
        {"match": "model.layers.0.mlp.down_proj", "scheme": KEEP},
        {"match": [r"re:.*\.down_proj", r"re:.*\.o_proj"], "bits": 8},
        {"match": r"re:.*layers\.0\.", "scheme": "fp8"},
    ]
    recipe = make_recipe({"scheme": "gptq", "group_size": 64, "layers": rules})
    assert recipe.layer_recipe("model.layers.0.mlp.down_proj") is None
    eight = recipe.layer_recipe("model.layers.1.mlp.down_proj")
    assert eight is not None
    assert (eight.weight.bits, eight.weight.group_size, eight.rounding) == (8, 64, "gptq")
    assert recipe.layer_recipe("model.layers.0.self_attn.q_proj") == PRESETS["fp8"]
    assert recipe.layer_recipe("model.layers.1.self_attn.q_proj") == make_recipe(
        {"scheme": "gptq", "group_size": 64}
    ).layer_recipe("x")


def test_a_rule_with_a_new_scheme_starts_from_its_defaults() -> None:
    base = LayerOptions(scheme="gptq", bits=3, act_order="group")
    assert LayerOptions(scheme="fp8").over(base).recipe() == PRESETS["fp8"]
    assert (
        LayerOptions(bits=5).over(base).recipe()
        == LayerOptions(scheme="gptq", bits=5, act_order="group").recipe()
    )


def test_text_is_needed_where_activations_decide() -> None:
    needing = {name for name in PRESETS if make_recipe({"scheme": name}).needs_data}
    assert needing == {"gptq", "awq", "awq+gptq", "smoothquant", "smoothquant+gptq"}
    rule = {"match": "x", "scheme": "awq"}
    assert make_recipe({"scheme": "rtn", "layers": [rule]}).needs_data
    assert make_recipe({"scheme": "fp8", "activations": "static"}).needs_data


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "no scheme was chosen"),
        ({"scheme": "qlora"}, "scheme 'qlora' is unknown; choose rtn, mse, gptq, awq"),
        ({"scheme": "awq", "bit": 4}, "bit = 4: .* Known keys: scheme, bits"),
        ({"scheme": "awq", "bits": 9}, "bits = 9: Input should be less than or equal to 8"),
        ({"scheme": "fp8", "bits": 4}, "bits 4 does not apply to scheme 'fp8'"),
        ({"scheme": "awq", "act_order": "group"}, "act_order 'group' does not apply to scheme"),
        ({"scheme": "awq", "alpha": 0.5}, "alpha 0.5 does not apply to scheme 'awq'"),
        ({"scheme": "gptq", "scales": "block"}, "scales 'block' does not apply"),
        ({"scheme": "awq", "activations": "dynamic"}, "activations 'dynamic' does not apply"),
        ({"scheme": "awq", "group_size": 0}, "group_size 0 has no meaning"),
        ({"scheme": "smoothquant", "alpha": 1.5}, "'smoothquant': .*less than or equal to 1"),
        ({"scheme": "awq", "layers": [{"match": "re:("}]}, r"'re:\(' is no regular expression"),
        ({"scheme": "awq", "layers": [{"match": "x", "scheme": "y"}]}, "scheme 'y' is unknown"),
        ({"scheme": "awq", "format": "gguf"}, "format = 'gguf'"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_recipe(keys)


def test_a_recipe_is_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("scheme: gptq\nbits: 3\nlayers:\n- match: re:.*o_proj\n  bits: 8\n")
    recipe = make_recipe(read_recipe(path))
    assert isinstance(recipe, Recipe)
    eight = recipe.layer_recipe("a.o_proj")
    assert eight is not None
    assert eight.weight.bits == 8


@pytest.mark.parametrize("text", ["- awq\n", "scheme: [", "\xff"])
def test_an_unreadable_recipe_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        read_recipe(path)
