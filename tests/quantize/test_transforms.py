"""Channel scales: what they are for any recipe, and that folding them changes no output."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.quantize.stage_data import (
    correlated_inputs,
    generator,
    random_weight,
    relative_error,
    round_weight,
    stats_of,
)
from vllm_quantkit.quantize.methods.smoothquant import Sharing
from vllm_quantkit.quantize.methods.transforms import channel_scales, fold, scaled_stats
from vllm_quantkit.quantize.recipes.recipe import LayerRecipe
from vllm_quantkit.spec import ActivationSpec, WeightSpec

NO_SHARING = Sharing(1, 1)
INT4 = WeightSpec(bits=4, group_size=32, symmetric=True)
INT8 = WeightSpec(bits=8, group_size=-1, symmetric=True)


class Norm(nn.Module):
    """y = x * (offset + w) + b, both as bfloat16 stores them."""

    def __init__(self, size: int, offset: float = 0.0, *, bias: bool = False) -> None:
        super().__init__()
        weight = torch.rand(size, generator=generator(5)) + 0.5 - offset
        self.weight = nn.Parameter(weight.bfloat16().float())
        self.bias = None
        if bias:
            shift = torch.randn(size, generator=generator(6))
            self.bias = nn.Parameter(shift.bfloat16().float())
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        y = x * (self.offset + self.weight)
        return y if self.bias is None else y + self.bias


def random_scales(size: int, *, powers: bool = False) -> Tensor:
    scales = torch.rand(size, generator=generator(7)) * 3 + 0.2
    return scales.log2().round().exp2() if powers else scales


def weights_of(layers: list[nn.Linear]) -> list[Tensor]:
    return [layer.weight.data for layer in layers]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("powers", [True, False], ids=["powers-of-two", "any"])
@pytest.mark.parametrize("kind", ["norm", "norm_plus_one"])
def test_folding_into_a_norm_changes_no_output(kind: str, powers: bool):
    """The readers take the scale that the rounded norm has: bfloat16 costs nothing."""
    norm = Norm(48, 1.0 if kind == "norm_plus_one" else 0.0)
    readers = [nn.Linear(48, 8), nn.Linear(48, 4, bias=False)]
    x = torch.randn(10, 48)
    before, scales = [reader(norm(x)) for reader in readers], random_scales(48, powers=powers)
    old = norm.weight.data.clone()
    fold(norm, kind, weights_of(readers), scales, NO_SHARING, dtype=torch.bfloat16)
    assert not torch.equal(norm.weight.data, old)
    assert torch.equal(norm.weight.data.bfloat16().float(), norm.weight.data)
    for expected, reader in zip(before, readers, strict=True):
        # 48 products, each rounded a few times by 6e-8.
        torch.testing.assert_close(reader(norm(x)), expected, rtol=1e-5, atol=3e-6)


def test_a_norms_bias_is_folded():
    norm, reader, x = Norm(48, bias=True), nn.Linear(48, 8), torch.randn(10, 48)
    before = reader(norm(x))
    scales = random_scales(48, powers=True)
    fold(norm, "norm", weights_of([reader]), scales, NO_SHARING, dtype=torch.bfloat16)
    torch.testing.assert_close(reader(norm(x)), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_that_cannot_hold_the_scale_keeps_its_weight(offset: float):
    """1 + w = 2^-7 over 64 would round to 0 beside -1, and 1 / 1e-39 is beyond bfloat16."""
    norm, reader, x = Norm(4, offset), nn.Linear(4, 3, bias=False), torch.randn(5, 4)
    norm.weight.data = torch.tensor([2**-7, 1.0, 0.0, 1.0]) - offset
    before, kept = reader(norm(x)), norm.weight.data.clone()
    kind = "norm_plus_one" if offset else "norm"
    scales = torch.tensor([64.0, 1e-39, 8.0, 2.0])
    fold(norm, kind, weights_of([reader]), scales, NO_SHARING, dtype=torch.bfloat16)
    assert torch.equal(norm.weight.data[1:3], kept[1:3])
    assert torch.equal(norm.weight.data[:1], kept[:1]) == bool(offset)
    assert norm.weight.data[3] == 0.5 - offset
    torch.testing.assert_close(reader(norm(x)), before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bias", [True, False])
def test_folding_into_the_last_rows_of_a_merged_linear(bias: bool):
    """Up is the last half of a merged gate_up: the gate stays what it was."""
    merged, down = nn.Linear(16, 2 * 24, bias=bias), nn.Linear(24, 8)
    x = torch.randn(10, 16)

    def run() -> tuple[Tensor, Tensor]:
        gate, up = merged(x).chunk(2, dim=-1)
        return down(nn.functional.silu(gate) * up), gate

    before, scales = run(), random_scales(24)
    fold(merged, "linear", [down.weight.data], scales, NO_SHARING, dtype=torch.float32)
    after = run()
    torch.testing.assert_close(after[0], before[0], rtol=1e-5, atol=3e-6)
    assert torch.equal(after[1], before[1])


def test_folding_over_heads_that_share_a_head():
    """Grouped-query attention: two value heads of four channels, each read by three heads."""
    sharing, qkv, o = Sharing(3, 4), nn.Linear(16, 40), nn.Linear(24, 8)
    x = torch.randn(10, 16)

    def run() -> Tensor:
        return o(sharing.spread(qkv(x)[0, -8:]))

    before = run()
    scales = sharing.spread(random_scales(8))
    fold(qkv, "linear", [o.weight.data], scales, sharing, dtype=torch.float32)
    torch.testing.assert_close(run(), before, rtol=1e-5, atol=3e-6)


@settings(max_examples=30, deadline=None)
@given(
    transform=st.sampled_from(["awq", "smoothquant"]),
    alpha=st.sampled_from([None, 0.0, 0.3, 1.0]),
    weight=st.sampled_from(
        [INT4, INT8, WeightSpec(bits=8, group_size=-1, symmetric=True, code_type="e4m3")]
    ),
    activation=st.sampled_from(
        [
            None,
            ActivationSpec(code="int8"),
            ActivationSpec(code="e4m3", dynamic=False, group_size=0),
            ActivationSpec(code="int8", dynamic=False, group_size=0, symmetric=False),
            ActivationSpec(code="int8", outlier_threshold=3.0),
        ]
    ),
    sharers=st.sampled_from([1, 2]),
    dead=st.booleans(),
    seed=st.integers(0, 100),
)
def test_scales_are_positive_and_shared(transform, alpha, weight, activation, sharers, dead, seed):
    inputs = correlated_inputs(48, tokens=64, seed=seed)
    weights = [random_weight(rows, 48, seed=seed + rows) for rows in (7, 3)]
    if dead:
        inputs[:, :24] = 0
        weights[0][:, 20:28] = 0
    recipe = LayerRecipe(weight=weight, activation=activation, transform=transform, alpha=alpha)
    sharing = Sharing(sharers, 12)
    found = channel_scales(weights, stats_of(inputs), recipe, sharing)
    assert found.scales.dtype is torch.float32
    assert bool(found.scales.isfinite().all())
    assert bool((found.scales > 0).all())
    heads = found.scales.view(-1, sharers, 12)
    assert torch.equal(heads, heads[:, :1].expand_as(heads))
    if found.alpha is None:
        assert torch.equal(found.scales, torch.ones(48))
        assert not found.note
    elif alpha is not None:
        assert found.alpha == alpha


def test_what_statistics_lack_is_said():
    weights, stats = [random_weight(8, 32)], stats_of(correlated_inputs(32))
    awq, smooth = (LayerRecipe(weight=INT4, transform=name) for name in ("awq", "smoothquant"))
    bare = replace(stats, hessian=None, sample=stats.sample[:0])
    for recipe, reason in [(awq, "no finite second moment"), (smooth, "no inputs were kept")]:
        found = channel_scales(weights, bare, recipe, NO_SHARING)
        fixed = recipe.model_copy(update={"alpha": 0.5})
        expected = channel_scales(weights, stats, fixed, NO_SHARING)
        assert torch.equal(found.scales, expected.scales)
        assert found.alpha == 0.5
        assert reason in found.note
        broken = replace(stats, ranges=replace(stats.ranges, high=torch.full((32,), torch.inf)))
        found = channel_scales(weights, broken, recipe, NO_SHARING)
        assert torch.equal(found.scales, torch.ones(32))
        assert "NaN or infinity" in found.note
    found = channel_scales(
        weights, replace(stats, hessian=stats.hessian * torch.nan), awq, NO_SHARING
    )
    assert found.alpha == 0.5


def test_without_a_transform_nothing_is_scaled():
    stats = stats_of(correlated_inputs(32))
    found = channel_scales([random_weight(8, 32)], stats, LayerRecipe(weight=INT4), NO_SHARING)
    assert torch.equal(found.scales, torch.ones(32))
    assert not found.note


def test_scaled_statistics_are_those_of_the_scaled_inputs():
    inputs, scales = correlated_inputs(48), random_scales(48)
    found, expected = scaled_stats(stats_of(inputs), scales), stats_of(inputs / scales)
    pairs = [(found.hessian, expected.hessian), (found.sample, expected.sample)]
    for ours, theirs in zip(
        (found.ranges, *found.halves), (expected.ranges, *expected.halves), strict=True
    ):
        assert ours.tokens == theirs.tokens
        pairs += [(getattr(ours, n), getattr(theirs, n)) for n in ("mean_abs", "low", "high")]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert scaled_stats(stats_of(inputs, hessian=False), scales).hessian is None


@pytest.mark.parametrize("transform", ["awq", "smoothquant"])
@pytest.mark.parametrize("rounding", ["nearest", "mse", "gptq"])
def test_transforms_and_roundings_add_up(transform: str, rounding: str):
    """On inputs with outliers either lowers the error, and both together lower it most.

    Clipping by activity and feedback already spare those channels: scales add a few per cent.
    """
    inputs, weight = correlated_inputs(96), random_weight(40, 96)
    inputs[:, [3, 70, 71]] *= 20

    def error(transform: str, rounding: str) -> float:
        recipe = LayerRecipe(weight=INT4, transform=transform, rounding=rounding)
        stats = stats_of(inputs)
        scales = channel_scales([weight], stats, recipe, NO_SHARING).scales
        scaled = scaled_stats(stats, scales)
        rounded = round_weight(weight * scales, scaled, recipe, scale_dtype=torch.float16)
        assert not rounded.note
        return relative_error(inputs, weight, rounded.weight.dequantize() / scales)

    both, alone = error(transform, rounding), error("none", rounding)
    assert both < (0.8 if rounding == "nearest" else 0.99) * alone
    if rounding != "nearest":
        assert both < 0.98 * error(transform, "nearest")
