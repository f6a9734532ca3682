"""Experts taken apart compute what transformers' fused experts compute."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig

from tests.tiny_models import COMMON, MOE_MODELS, TinyModel, randomise
from vllm_quantkit.quantize.model.experts import LinearExperts, can_be_taken_apart

ROUNDING = 1e-6
"""Of the largest output: gate and up are two products instead of one, in float32."""


def moe_layer(family: str) -> torch.nn.Module:
    """The mixture of a small model's last block, in float32."""
    torch.manual_seed(0)
    tiny: TinyModel = MOE_MODELS[family]
    config = tiny.config(**{**COMMON, **tiny.extra, "hidden_size": 64, "vocab_size": 32})
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation="eager"
    )
    randomise(model)
    return model.model.layers[-1].mlp.eval()


def take_apart(fused: torch.nn.Module) -> LinearExperts:
    """The same experts, as linear layers."""
    gate_up, down = fused.gate_up_proj.detach(), fused.down_proj.detach()
    apart = LinearExperts(copy.deepcopy(fused))
    for index, expert in enumerate(apart.experts()):
        gate, up = gate_up[index].chunk(2)
        for layer, weight in (
            (expert.gate_proj, gate),
            (expert.up_proj, up),
            (expert.down_proj, down[index]),
        ):
            layer.weight = torch.nn.Parameter(weight.clone())
    return apart


@pytest.fixture(params=MOE_MODELS)
def layer(request: pytest.FixtureRequest) -> torch.nn.Module:
    return moe_layer(request.param)


@torch.no_grad()
@pytest.mark.parametrize("route_all", [False, True])
def test_same_outputs_as_the_fused_experts(layer, route_all):
    x = torch.randn(3, 7, 64)
    expected = layer(x)
    layer.experts = take_apart(layer.experts)
    layer.experts.route_all = route_all
    found = layer(x)
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


@torch.no_grad()
def test_hooks_see_the_tokens_that_were_routed_or_all(layer):
    layer.experts = take_apart(layer.experts)
    x = torch.randn(5, 64)
    index = torch.tensor([[0, 2], [2, 0], [0, 2], [0, 2], [0, 2]])
    seen: dict[int, torch.Tensor] = {}
    for number, expert in enumerate(layer.experts.experts()):
        expert.down_proj.register_forward_pre_hook(
            lambda _, args, number=number: seen.__setitem__(number, args[0])
        )
    layer.experts(x[:4], index[:4], torch.rand(4, 2))
    assert {number: len(rows) for number, rows in seen.items()} == {0: 4, 2: 4}

    layer.experts.route_all = True
    layer.experts(x, index, torch.rand(5, 2))
    assert {len(rows) for rows in seen.values()} == {5}
    assert len(seen) == layer.experts.size
    assert layer.experts.counts.tolist()[:4] == [9, 0, 9, 0]


@torch.no_grad()
def test_counts_are_what_the_router_chose(layer):
    layer.experts = take_apart(layer.experts)
    chosen = []
    layer.gate.register_forward_hook(lambda *call: chosen.append(call[-1][-1]))
    for _ in range(2):
        layer(torch.randn(2, 9, 64))
    expected = [int((torch.cat(chosen) == e).sum()) for e in range(layer.experts.size)]
    assert layer.experts.counts.tolist() == expected
    assert sum(expected) == 2 * 18 * chosen[0].shape[1]


@torch.no_grad()
def test_no_tokens_at_all(layer):
    apart = take_apart(layer.experts)
    nothing = torch.zeros(0, 2, dtype=torch.int64)
    assert apart(torch.empty(0, 64), nothing, torch.empty(0, 2)).shape == (0, 64)
    assert apart.counts.sum() == 0


@torch.no_grad()
def test_an_expert_without_tokens_changes_nothing(layer):
    apart = take_apart(layer.experts)
    x, index, weights = torch.randn(4, 64), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    expected = apart(x, index, weights)
    for expert in list(apart.experts())[1:]:
        expert.down_proj.weight.fill_(torch.nan)
    for route_all in (False, True):
        apart.route_all = route_all
        found = apart(x, index, weights)
        # Rows of a product may be summed in another order where there are more of them.
        assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


def test_other_layouts_are_not_taken_apart(layer):
    assert can_be_taken_apart(layer.experts)
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_local_experts=2,
        vocab_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    other = AutoModelForCausalLM.from_config(config).model.layers[0].mlp.experts
    assert not can_be_taken_apart(other)
    assert not can_be_taken_apart(layer.gate)
    layer.experts.is_transposed = True
    assert not can_be_taken_apart(layer.experts)
