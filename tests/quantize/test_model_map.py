"""The map is proved by running blocks: scales that go into a source come out of its readers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import MOE_MODELS, TINY_MODELS, create_tiny_model
from vllm_quantkit.quantize.methods.smoothquant import Sharing
from vllm_quantkit.quantize.model.experts import LinearExperts
from vllm_quantkit.quantize.model.model_map import (
    FAMILIES,
    BlockParts,
    Heads,
    Source,
    Stage,
    heads_of,
    stages_of,
)
from vllm_quantkit.quantize.model.model_shell import ModelShell
from vllm_quantkit.spec import LayerShape

MAPPED = [family for family in (*TINY_MODELS, *MOE_MODELS) if family != "gpt2"]

GEMMA_ROUNDING = 1e-5
"""Of the largest output: (1 + w) / s - 1 is rounded once more; all other folds are exact."""

NO_SOURCE = {"deepseek_v2": {"self_attn.o_proj"}, "deepseek_v3": {"self_attn.o_proj"}}


@pytest.fixture(scope="module", params=MAPPED)
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelShell:
    folder: Path = tmp_path_factory.mktemp(request.param) / "model"
    sizes = {"hidden_size": 128, "intermediate_size": 160}
    return ModelShell.open(create_tiny_model(request.param, folder, **sizes))


@contextmanager
def running(shell: ModelShell, index: int) -> Iterator[tuple[nn.Module, Callable[[], Tensor]]]:
    """A block with weights, and what runs it on random hidden states."""
    ids = torch.randint(4, 500, (2, 11), generator=torch.Generator().manual_seed(0))
    with shell.open_ends(), shell.block(index) as block, torch.no_grad():
        hidden, calls = shell.enter(ids, None)
        hidden = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        yield block, lambda: calls[index].run(block, hidden)


def fold_powers(block: nn.Module, stage: Stage, *, readers: bool = True) -> None:
    """Source / s for random powers of two s, one by one; columns of its readers * s."""
    source, reading = block.get_submodule(stage.source.module), (*stage.layers, *stage.also)
    width = block.get_submodule(stage.layers[0]).weight.shape[1]
    channels = width // stage.sharing.sharers
    s = 2.0 ** torch.randint(-3, 4, (channels,), generator=torch.Generator().manual_seed(2))
    if stage.source.kind == "norm_plus_one":
        source.weight.copy_((1 + source.weight) / s - 1)
    else:
        first = len(source.weight) - channels
        for tensor in (source.weight, getattr(source, "bias", None)):
            if tensor is not None:
                for channel in range(channels):
                    tensor[first + channel] /= s[channel]
    if readers:
        for name in reading:
            weight = block.get_submodule(name).weight
            for column in range(width):
                weight[:, column] *= s[channel_of(column, stage.sharing)]


def channel_of(column: int, sharing: Sharing) -> int:
    """The source's channel that a reader's column reads."""
    head, offset = divmod(column, sharing.width)
    return head // sharing.sharers * sharing.width + offset


def test_stages_hold_every_layer_once(shell):
    for index in range(shell.block_count):
        layers = [name for stage in shell.stages(index) for name in stage.layers]
        assert sorted(layers) == sorted(shell.linears(index))
        with shell.block(index) as block:
            matrices = {
                name
                for name, module in block.named_modules()
                if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 2
            }
            for name in layers:
                assert isinstance(block.get_submodule(name), nn.Linear)
        prefix = f"{shell.block_name(index)}."
        kept = {name.rpartition(".")[2] for name in shell.kept(index)}
        others = matrices - set(layers)
        assert {name.rpartition(".")[2] for name in others} == kept
        assert shell.stored_name(f"{prefix}{layers[0]}").startswith(prefix)


def test_only_known_stages_have_no_source(shell):
    expected = NO_SOURCE.get(shell.config.model_type, set())
    for index in range(shell.block_count):
        missing = {s.layers[0] for s in shell.stages(index) if s.source is None}
        assert missing == expected


def test_scales_of_a_source_come_out_of_its_readers(shell):
    for index in range(shell.block_count):
        for stage in shell.stages(index):
            if stage.source is None:
                continue
            with running(shell, index) as (block, run):
                expected = run()
                fold_powers(block, stage)
                found = run()
            if stage.source.kind == "norm_plus_one":
                assert (found - expected).abs().max() <= GEMMA_ROUNDING * expected.abs().max()
            else:
                assert torch.equal(found, expected), stage


def test_scales_of_a_source_reach_the_output(shell):
    """The check above can fail: what was folded is noticed where readers do not take it back."""
    for stage in shell.stages(1):
        if stage.source is None or stage.layers[0].startswith("mlp.experts."):
            continue
        with running(shell, 1) as (block, run):
            expected = run()
            fold_powers(block, stage, readers=False)
            assert not torch.allclose(run(), expected, rtol=1e-3), stage


def test_all_layers_of_a_stage_read_what_is_observed(shell):
    for index in range(shell.block_count):
        stages = shell.stages(index)
        seen: dict[str, Tensor] = {}
        with running(shell, index) as (block, run):
            for module in block.modules():
                if isinstance(module, LinearExperts):
                    module.route_all = True
            names = {name for stage in stages for name in (*stage.layers, *stage.also)}
            for name in names | {stage.observed for stage in stages if stage.observed}:
                note = partial(note_input, seen, name)
                block.get_submodule(name).register_forward_pre_hook(note)
            run()
        for stage in stages:
            first = seen[stage.observed or stage.layers[0]]
            assert len(first) == 22
            for name in (*stage.layers, *stage.also):
                assert torch.equal(seen[name], first), name


def test_stages_run_in_order(shell):
    for index in range(shell.block_count):
        seen: dict[str, Tensor] = {}
        stages = shell.stages(index)
        with running(shell, index) as (block, run):
            for stage in stages:
                for name in stage.layers:
                    note = partial(note_input, seen, name)
                    block.get_submodule(name).register_forward_pre_hook(note)
            run()
        order = list(seen)
        runs = [min((order.index(n) for n in s.layers if n in order), default=-1) for s in stages]
        outside_mixtures = [run for run, s in zip(runs, stages, strict=True) if not moe(s)]
        assert outside_mixtures == sorted(outside_mixtures)


def note_input(seen: dict[str, Tensor], name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    seen[name] = args[0].flatten(0, -2)


def moe(stage: Stage) -> bool:
    """Experts run in the order of their numbers, shared ones before or after."""
    return "expert" in stage.layers[0]


def llama_parts(**changed: tuple[int, int]) -> BlockParts:
    """A block of Llama's with hidden size 64, MLP size 96, 4 query heads of 16 and 2 shared."""
    sizes = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (96, 64),
        "mlp.up_proj": (96, 64),
        "mlp.down_proj": (64, 96),
    }
    sizes |= {name.replace("__", "."): size for name, size in changed.items()}
    layers = {
        name: LayerShape(out_features=rows, in_features=columns)
        for name, (rows, columns) in sizes.items()
    }
    norms = {"input_layernorm": 64, "post_attention_layernorm": 64}
    return BlockParts(layers, {}, norms, Heads(4, 2, 16))


def source_of(parts: BlockParts, layer: str) -> Source | None:
    (stage,) = (s for s in stages_of(FAMILIES["llama"], parts) if layer in s.layers)
    return stage.source


def test_heads_in_groups_share_channels_of_v():
    stages = stages_of(FAMILIES["llama"], llama_parts())
    assert [stage.sharing for stage in stages] == [
        Sharing(1, 1),
        Sharing(2, 16),
        Sharing(1, 1),
        Sharing(1, 1),
    ]
    assert stages[1].source == Source("self_attn.v_proj", "linear")


@pytest.mark.parametrize(
    ("parts", "layer"),
    [
        (llama_parts(self_attn__v_proj=(48, 64)), "self_attn.o_proj"),
        (llama_parts(self_attn__o_proj=(64, 32)), "self_attn.o_proj"),
        (replace(llama_parts(), heads=None), "self_attn.o_proj"),
        (replace(llama_parts(), heads=Heads(4, 3, 16)), "self_attn.o_proj"),
        (llama_parts(mlp__up_proj=(192, 64)), "mlp.down_proj"),
        (replace(llama_parts(), norms={}), "mlp.up_proj"),
        (replace(llama_parts(), norms={"input_layernorm": 16}), "self_attn.q_proj"),
    ],
)
def test_what_does_not_fit_has_no_source(parts, layer):
    assert source_of(llama_parts(), layer) is not None
    assert source_of(parts, layer) is None


def test_layers_a_family_does_not_usually_have_are_stages_of_their_own():
    stages = stages_of(FAMILIES["llama"], llama_parts(cross__extra=(64, 64)))
    assert stages[-1] == Stage((("cross.extra",),), None)
    assert len(stages) == 5


def test_an_unknown_architecture_has_one_stage_per_layer():
    parts = llama_parts()
    assert stages_of(None, parts) == tuple(Stage(((name,),), None) for name in parts.layers)


def test_a_config_without_attention_heads_has_none():
    assert heads_of(object()) is None
