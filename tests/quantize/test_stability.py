"""Scales that the halves of a calibration set disagree on, and static scales themselves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit_kernels.act_quant.reference import reference_quantize
from quantkit_kernels.act_quant.rows import PER_TENSOR, RowQuantizer
from tests.helpers import block_linears
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.quantize.calibration import CalibrationOptions, TokenSet, load_token_sets
from vllm_quantkit.quantize.observation.stability import (
    STATIC_REFUSED,
    UNSTABLE,
    UnstableScales,
    is_unstable,
    refuse_unstable_static,
    scale_disagreement,
    static_input_scale,
)
from vllm_quantkit.quantize.observation.statistics import InputMoments, Ranges
from vllm_quantkit.quantize.recipes.recipe import LayerRecipe
from vllm_quantkit.spec import ActivationSpec, WeightSpec

DEMO = Path(__file__).parents[2] / "examples" / "tiny-lm"
WEIGHT = WeightSpec(bits=8, group_size=-1, symmetric=True)
INT8 = ActivationSpec(code="int8", dynamic=False, group_size=PER_TENSOR)
ASYMMETRIC = ActivationSpec(code="int8", dynamic=False, group_size=PER_TENSOR, symmetric=False)
E4M3 = ActivationSpec(code="e4m3", dynamic=False, group_size=PER_TENSOR)
STATIC = (INT8, ASYMMETRIC, E4M3)
DYNAMIC = ActivationSpec(code="int8")


def ranges(low: list[float], high: list[float], mean: list[float] | None = None) -> Ranges:
    return Ranges(torch.tensor(mean or high), torch.tensor(low), torch.tensor(high), tokens=9)


def nothing(channels: int) -> Ranges:
    return InputMoments(channels, hessian=False, expected_rows=1)._ranges(0)


def seen(x: torch.Tensor) -> Ranges:
    moments = InputMoments(x.shape[-1], hessian=False, expected_rows=len(x))
    moments.add(x, 0)
    return moments.stats().ranges


@pytest.mark.parametrize("activation", STATIC)
@settings(max_examples=40, deadline=None)
@given(low=st.floats(-1e3, 1e3, width=32), spread=st.floats(0, 1e3, width=32))
def test_a_static_scale_is_the_dynamic_one_of_all_inputs(activation, low, spread):
    x = torch.linspace(low, low + spread, 21).view(3, 7)
    quantizer = RowQuantizer(activation.code, PER_TENSOR, activation.symmetric)
    # One row of everything: the reference makes one scale and one zero-point for it.
    expected = reference_quantize(x.view(1, -1), quantizer)

    scale, zero = static_input_scale(seen(x), activation)

    assert scale.shape == (1,)
    assert scale.dtype == torch.float32
    assert torch.equal(scale, expected.scales[0])
    assert (zero is None) == activation.symmetric
    assert zero is None or torch.equal(zero, expected.zeros)


@pytest.mark.parametrize("activation", STATIC)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_inputs_without_a_range_get_no_static_scale(activation, value):
    with pytest.raises(QuantkitError, match="no static scale covers that: use dynamic"):
        static_input_scale(seen(torch.tensor([[1.0, value]])), activation)
    with pytest.raises(QuantkitError, match="over 0 calibration tokens"):
        static_input_scale(nothing(2), activation)


HALVES = (ranges([-4, -1], [2, 1], [1.0, 0.5]), ranges([-2, -1], [8, 1], [3.0, 0.5]))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"activation": DYNAMIC}, None),
        # max|x|: 4 and 8.
        ({"activation": INT8}, math.log(2)),
        ({"activation": E4M3}, math.log(2)),
        # Widths 6 and 10, of both 12.
        ({"activation": ASYMMETRIC}, math.log(2)),
        ({"transform": "smoothquant"}, 0.5 * math.log(2)),
        ({"transform": "smoothquant", "alpha": 0.75}, 0.75 * math.log(2)),
        ({"transform": "awq"}, math.log(3)),
        ({"rounding": "gptq"}, math.log(3)),
        ({"rounding": "mse"}, math.log(3)),
        ({"transform": "smoothquant", "rounding": "gptq"}, math.log(3)),
        ({"transform": "smoothquant", "activation": INT8}, math.log(2)),
    ],
)
def test_how_far_the_halves_are_apart(changes, expected):
    recipe = LayerRecipe(weight=WEIGHT, **changes)
    both = [scale_disagreement(halves, recipe) for halves in (HALVES, HALVES[::-1])]

    assert both == ([None] * 2 if expected is None else pytest.approx([expected] * 2))
    agreeing = scale_disagreement((HALVES[0], HALVES[0]), recipe)
    if changes.get("activation") is ASYMMETRIC or expected is not None:
        assert agreeing == pytest.approx(0, abs=1e-6)  # one float32 rounding of a logarithm
    else:
        assert agreeing is None


def test_ranges_of_the_same_width_at_other_places_disagree():
    halves = (ranges([0.0], [4.0]), ranges([-4.0], [0.0]))

    apart = scale_disagreement(halves, LayerRecipe(weight=WEIGHT, activation=ASYMMETRIC))

    assert apart == pytest.approx(math.log(2))


def test_few_channels_that_hardly_fire_do_not_count():
    first, second = torch.ones(101), torch.ones(101)
    second[:5] = 1e-9
    second[5] = 0.5
    halves = (ranges([0.0] * 101, first.tolist()), ranges([0.0] * 101, second.tolist()))

    assert scale_disagreement(halves, LayerRecipe(weight=WEIGHT, transform="awq")) == pytest.approx(
        math.log(2)
    )


@pytest.mark.parametrize(
    "changes", [{"activation": INT8}, {"transform": "awq"}, {"transform": "smoothquant"}]
)
def test_a_half_that_saw_nothing_disagrees_with_any(changes):
    recipe = LayerRecipe(weight=WEIGHT, **changes)
    apart = scale_disagreement((HALVES[0], nothing(2)), recipe)

    assert apart is not None
    assert math.isfinite(apart)
    assert is_unstable(apart)
    assert scale_disagreement((nothing(2), nothing(2)), recipe) is None


def test_more_samples_agree_better():
    """Normal inputs with heavy channels: 16 samples of 8 tokens are too few, 4,096 are enough."""
    generator = torch.Generator().manual_seed(0)
    recipe = LayerRecipe(weight=WEIGHT, transform="awq")
    size = torch.logspace(-1, 1, 64)
    apart = [
        scale_disagreement(
            tuple(seen(torch.randn(count * 4, 64, generator=generator) * size) for _ in range(2)),
            recipe,
        )
        for count in (16, 256, 4096)
    ]

    assert apart == sorted(apart, reverse=True)
    assert [is_unstable(value) for value in apart] == [True, False, False]


def unstable_share(model: nn.Module, tokens: TokenSet) -> float:
    """Of the blocks' layers, by the mean |x| that each half of the set shows them."""
    layers = block_linears(model)
    moments = {
        name: InputMoments(layer.in_features, hessian=False, expected_rows=tokens.tokens)
        for name, layer in layers.items()
    }
    current = [0]
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: moments[name].add(args[0], current[0])
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for ids, _, current[0] in tokens.batches(32):
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    recipe = LayerRecipe(weight=WEIGHT, transform="awq")
    apart = [scale_disagreement(part.stats().halves, recipe) for part in moments.values()]
    return sum(map(is_unstable, apart)) / len(apart)


def test_256_samples_of_real_text_are_enough_where_16_are_not():
    """The demo model and its calibration text; shares seen with three seeds: 10 % and 100 %."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "bf16")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "bf16", dtype=torch.float32).eval()
    text = str(DEMO / "data" / "calibration.txt")
    enough = CalibrationOptions(source=text, length=64)
    few = enough.model_copy(update={"samples": 16})

    shares = [
        unstable_share(model, load_token_sets(options, tokenizer, 1024).calibration)
        for options in (few, enough)
    ]

    assert shares[0] > 0.5
    assert shares[1] < 0.25


def test_the_bound_is_a_tenth():
    assert pytest.approx(1.1) == math.exp(UNSTABLE)
    assert is_unstable(UNSTABLE * 1.001)
    assert not is_unstable(UNSTABLE)
    assert not is_unstable(None)


@pytest.mark.parametrize("activation", STATIC)
def test_unstable_static_scales_are_refused(activation):
    far = math.exp(STATIC_REFUSED)
    allowed = (ranges([0.0], [1.0]), ranges([0.0], [far * 0.999]))
    refused = (ranges([0.0], [1.0]), ranges([0.0], [far * 1.001]))

    refuse_unstable_static("model.layers.3.mlp.down_proj", allowed, activation)
    with pytest.raises(UnstableScales) as error:
        refuse_unstable_static("model.layers.3.mlp.down_proj", refused, activation)

    first, second = (float(static_input_scale(half, activation)[0]) for half in refused)
    assert str(error.value).startswith("model.layers.3.mlp.down_proj: the halves of the calibrat")
    assert f"scales of {first:.4g} and {second:.4g}, of which the smaller" in str(error.value)
    assert "grow by 50% to cover both (at most 50% is accepted): give more samples" in str(
        error.value
    )


def test_dynamic_activations_are_never_refused():
    halves = (ranges([0.0], [1.0]), ranges([0.0], [100.0]))

    refuse_unstable_static("layer", halves, DYNAMIC)
    refuse_unstable_static("layer", halves, None)
    with pytest.raises(UnstableScales, match=r"scales of 0\.007874 and 7\.874e-08"):
        refuse_unstable_static("layer", (halves[0], nothing(1)), INT8)
