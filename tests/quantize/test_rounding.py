"""What a recipe makes of a weight, and what happens where calibration failed."""

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit_kernels.code_types import FLOAT8_DTYPES
from quantkit_kernels.wna16 import QuantizedWeight
from tests.quantize.stage_data import (
    correlated_inputs,
    random_weight,
    relative_error,
    round_weight,
    stats_of,
)
from vllm_quantkit.errors import QuantkitError, UnsupportedScheme
from vllm_quantkit.quantize.methods.gptq import Feedback
from vllm_quantkit.quantize.methods.rounding import Rounded, nearest, round_weights
from vllm_quantkit.quantize.methods.rtn import rtn
from vllm_quantkit.quantize.observation.statistics import InputStats
from vllm_quantkit.quantize.recipes.recipe import LayerRecipe
from vllm_quantkit.spec import ALL_ROWS, WeightSpec

N, K = 20, 136
ORDERS = ("none", "static", "group")
INPUTS = correlated_inputs(K)
STATS = stats_of(INPUTS)
WEIGHT = random_weight(N, K)


def recipe_of(
    rounding: str = "gptq",
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    order: str = "none",
    damping: float = 0.01,
) -> LayerRecipe:
    spec = WeightSpec(
        bits=bits, group_size=group_size, symmetric=symmetric, act_order=order == "group"
    )
    return LayerRecipe(weight=spec, rounding=rounding, order=order, damping=damping)


def round_half(weight: Tensor, stats: InputStats | None, recipe: LayerRecipe) -> Rounded:
    return round_weight(weight, stats, recipe, scale_dtype=torch.float16)


def is_valid(weight: QuantizedWeight) -> bool:
    return (
        bool(weight.dequantize().isfinite().all())
        and int(weight.codes.max()) < 2**weight.bits
        and int(weight.zeros.max()) < 2**weight.bits
        and bool((weight.scales > 0).all())
    )


def is_clipped_without_inputs(rounded: Rounded, weight: Tensor, recipe: LayerRecipe) -> bool:
    expected = rtn(weight, recipe.weight, clip=True)
    return all(
        torch.equal(getattr(rounded.weight, name), getattr(expected, name))
        for name in ("codes", "scales", "zeros", "group_index")
    )


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    channels=st.integers(1, 100),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 16, 24, 32, 128]),
    symmetric=st.booleans(),
    rounding=st.sampled_from(["nearest", "mse", "gptq"]),
    order=st.sampled_from(ORDERS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_numerics(
    rows, channels, bits, group_size, symmetric, rounding, order, dtype, seed
):
    recipe = recipe_of(
        rounding,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        order=order if rounding == "gptq" else "none",
    )
    weight = random_weight(rows, channels, seed=seed)
    inputs = correlated_inputs(channels, tokens=64, seed=seed)
    rounded = round_weight(weight, stats_of(inputs), recipe, scale_dtype=dtype)
    assert is_valid(rounded.weight)
    assert rounded.weight.codes.shape == weight.shape
    assert rounded.weight.scales.shape == (rows, recipe.weight.num_groups(channels))
    assert torch.equal(rounded.weight.scales.to(dtype).float(), rounded.weight.scales)
    sizes = torch.bincount(rounded.weight.group_index.long())
    width = channels if group_size == -1 else group_size
    assert all(int(size) == width for size in sizes[:-1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_inputs_lower_the_output_error(bits: int, group_size: int, symmetric: bool):
    """Clipping by a twentieth where steps are coarse, feedback by a third or more everywhere.

    Each group's range is the best by itself: together they may be 1 % worse than full ones.
    """
    errors = {
        name: relative_error(INPUTS, WEIGHT, round_half(WEIGHT, STATS, recipe).weight.dequantize())
        for name, recipe in {
            rounding + order: recipe_of(
                rounding, bits=bits, group_size=group_size, symmetric=symmetric, order=order
            )
            for rounding, order in [
                ("nearest", "none"),
                ("mse", "none"),
                *(("gptq", order) for order in ORDERS),
            ]
        }.items()
    }
    assert errors["msenone"] <= (0.95 if bits <= 3 else 1.01) * errors["nearestnone"]
    for order in ORDERS:
        assert errors[f"gptq{order}"] < 0.67 * errors["nearestnone"]
    assert errors["gptqgroup"] < errors["gptqnone"]


@pytest.mark.parametrize("order", ORDERS)
def test_stacked_layers_are_rounded_as_each_by_itself(order: str):
    weights = [random_weight(rows, K, seed=rows) for rows in (5, 1, 12)]
    together = round_weights(weights, STATS, recipe_of(order=order), scale_dtype=torch.float16)
    for weight, rounded in zip(weights, together, strict=True):
        alone = round_half(weight, STATS, recipe_of(order=order))
        same = (alone.weight.codes == rounded.weight.codes).float().mean()
        # Sums of other lengths round differently, and near ties with them.
        assert float(same) > 0.99
        assert rounded.weight.codes.untyped_storage().nbytes() == weight.numel()


@pytest.mark.parametrize("rounding", ["mse", "gptq"])
@pytest.mark.parametrize("order", ORDERS)
def test_without_statistics_the_weight_alone_decides(rounding: str, order: str):
    if rounding == "mse" and order != "none":
        return
    recipe = recipe_of(rounding, order=order)
    nan, infinite = (
        replace(STATS, hessian=STATS.hessian.clone().fill_(value))
        for value in (torch.nan, torch.inf)
    )
    for stats, reason in [
        (None, "no calibration token reached the layer."),
        (replace(STATS, hessian=None), "second moments of the layer's inputs were not collected."),
        (nan, "the Hessian has NaN or infinite values"),
        (infinite, "the Hessian has NaN or infinite values"),
        (replace(STATS, hessian=-torch.eye(K)), "136 negative values on its diagonal of 136"),
    ]:
        rounded = round_half(WEIGHT, stats, recipe)
        assert is_clipped_without_inputs(rounded, WEIGHT, recipe)
        assert rounded.note.startswith("Rounded to ranges of least weight error instead of ")
        assert reason in rounded.note
        assert rounded.note.endswith(".")


def test_nearest_looks_at_no_statistics():
    rounded = round_half(WEIGHT, None, recipe_of("nearest"))
    assert not rounded.note
    assert torch.equal(rounded.weight.codes, rtn(WEIGHT, recipe_of("nearest").weight).codes)


def test_a_hessian_that_no_damping_mends():
    hessian = 1e9 * (1 - torch.eye(K)) + torch.eye(K)
    rounded = round_half(WEIGHT, replace(STATS, hessian=hessian), recipe_of())
    assert is_clipped_without_inputs(rounded, WEIGHT, recipe_of())
    assert "not positive definite even with damping" in rounded.note


def test_a_raised_damping_is_noted():
    hessian = STATS.hessian - 2 * torch.linalg.eigvalsh(STATS.hessian)[8] * torch.eye(K)
    assert float(torch.linalg.eigvalsh(hessian)[0]) < 0
    hessian.diagonal().clamp_(min=0.01)
    rounded = round_half(WEIGHT, replace(STATS, hessian=hessian), recipe_of(damping=1e-5))
    assert is_valid(rounded.weight)
    assert "not positive definite with damping 1e-05, so it was raised to 0.1." in rounded.note


def test_fewer_tokens_than_channels():
    inputs = INPUTS[:10]
    recipe = recipe_of()
    rounded = round_half(WEIGHT, stats_of(inputs), recipe)
    plain = relative_error(inputs, WEIGHT, rtn(WEIGHT, recipe.weight).dequantize())
    assert not rounded.note
    assert relative_error(inputs, WEIGHT, rounded.weight.dequantize()) < 0.3 * plain


def test_channels_that_never_fire():
    inputs = INPUTS.clone()
    inputs[:, [0, 17, K - 1]] = 0
    for order in ORDERS:
        rounded = round_half(WEIGHT, stats_of(inputs), recipe_of(order=order))
        assert is_valid(rounded.weight)
        assert rounded.note.startswith("3 of 136 input channels never fired")
        # Half a step, and what clipping their group's range to half cuts off.
        error = (rounded.weight.dequantize() - WEIGHT).abs()[:, [0, 17, K - 1]]
        assert float(error.max()) < 0.5 * float(WEIGHT.abs().max())


def test_nothing_fires():
    rounded = round_half(WEIGHT, stats_of(torch.zeros(64, K)), recipe_of())
    assert is_valid(rounded.weight)
    assert relative_error(torch.eye(K), WEIGHT, rounded.weight.dequantize()) < 0.3


@pytest.mark.parametrize("rounding", ["nearest", "mse", "gptq"])
@pytest.mark.parametrize("value", [0.0, 1e-7, -0.3])
def test_constant_weights(rounding: str, value: float):
    weight = torch.full((4, K), value)
    for symmetric in (True, False):
        rounded = round_half(weight, STATS, recipe_of(rounding, symmetric=symmetric))
        assert is_valid(rounded.weight)
        limit = 0.1 * abs(value) + 1e-6  # float16 scales end near 6e-8
        assert float((rounded.weight.dequantize() - weight).abs().max()) <= limit


@pytest.mark.parametrize("rounding", ["nearest", "mse", "gptq"])
def test_a_weight_that_is_not_finite_is_refused(rounding: str):
    weight = WEIGHT.clone()
    weight[3, 7] = torch.nan
    with pytest.raises(QuantkitError, match="1 NaN or infinite values among"):
        round_half(weight, STATS, recipe_of(rounding))
    with pytest.raises(QuantkitError, match="1 NaN or infinite values among"):
        round_half(weight, None, recipe_of(rounding))


def test_a_weight_beyond_float16_scales_is_refused():
    with pytest.raises(QuantkitError, match=r"does not fit in torch\.float16"):
        round_half(WEIGHT * 1e9, STATS, recipe_of())


def test_codes_worse_than_clipping_are_dropped(monkeypatch: pytest.MonkeyPatch):
    broken = rtn(torch.zeros_like(WEIGHT), recipe_of().weight)
    monkeypatch.setattr(
        "vllm_quantkit.quantize.methods.rounding.gptq", lambda *args, **named: (broken, 0.01)
    )
    rounded = round_half(WEIGHT, STATS, recipe_of())
    expected = rtn(WEIGHT, recipe_of().weight, clip=True, hessian=STATS.hessian)
    assert torch.equal(rounded.weight.codes, expected.codes)
    assert "instead of GPTQ, whose codes had a squared output error of" in rounded.note


def test_overflowing_feedback_falls_back(monkeypatch: pytest.MonkeyPatch):
    feedback = Feedback(torch.full((K, K), torch.inf).triu(), STATS.hessian.diagonal(), 0.01)
    # By its module, since the package has a function of that name.
    module = sys.modules["vllm_quantkit.quantize.methods.gptq"]
    monkeypatch.setattr(module, "find_feedback", lambda hessian, damping: feedback)
    rounded = round_half(WEIGHT, STATS, recipe_of())
    assert is_clipped_without_inputs(rounded, WEIGHT, recipe_of())
    assert "grew beyond float32" in rounded.note


@pytest.mark.parametrize("code_type", ["e4m3", "e5m2"])
@pytest.mark.parametrize(("group_size", "scale_rows"), [(-1, 1), (-1, ALL_ROWS), (64, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats(code_type: str, group_size: int, scale_rows: int, dtype: torch.dtype):
    spec = WeightSpec(
        bits=8, group_size=group_size, symmetric=True, code_type=code_type, scale_rows=scale_rows
    )
    rounded = round_weight(WEIGHT, None, LayerRecipe(weight=spec), scale_dtype=dtype)
    weight = rounded.weight
    assert not rounded.note
    assert torch.equal(weight.scales.to(dtype).float(), weight.scales)
    scales = weight.scales[:, weight.group_index.long()]
    values = torch.arange(256, dtype=torch.uint8).view(FLOAT8_DTYPES[code_type]).float()
    values = values[values.isfinite()]
    best = (values[:, None, None] * scales - WEIGHT).abs().amin(0)
    # The codes are the nearest of all; products and quotients of float32 differ by 1e-7 of 0.2.
    torch.testing.assert_close((weight.dequantize() - WEIGHT).abs(), best, rtol=0, atol=1e-7)


def test_what_is_not_served_is_refused():
    nf4 = WeightSpec(bits=4, group_size=64, symmetric=True, code_type="nf4")
    shared = WeightSpec(bits=8, group_size=-1, symmetric=True, scale_rows=ALL_ROWS)
    for spec, words in [(nf4, "cannot be rounded to 'nf4'"), (shared, "shared by -1 rows")]:
        with pytest.raises(UnsupportedScheme, match=words):
            round_half(WEIGHT, None, LayerRecipe(weight=spec))


@pytest.mark.parametrize("code_type", ["int", "e4m3"])
def test_nearest_is_what_rounding_to_nearest_stores(code_type: str):
    bits = 4 if code_type == "int" else 8
    spec = WeightSpec(bits=bits, group_size=64, symmetric=True, code_type=code_type)
    stored = round_weight(WEIGHT, None, LayerRecipe(weight=spec), scale_dtype=torch.float32)
    assert torch.equal(nearest(WEIGHT, spec), stored.weight.dequantize())
