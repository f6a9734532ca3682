"""Decoder blocks are found, and parameters have no storage, whatever the model looks like."""

import pytest
import torch
from torch import nn

from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.quantize.model.skeleton import LARGE, find_blocks, parameters_on_meta


class Block(nn.Module):
    """Has a list of its own, longer than the list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))


class Other(Block):
    """Another class of block."""


def model(**lists: list[nn.Module]) -> nn.Module:
    root = nn.Module()
    root.body = nn.Module()
    for name, modules in lists.items():
        root.body.add_module(name, nn.ModuleList(modules))
    return root


def test_the_longest_list_that_is_in_no_other():
    root = model(
        first=[Block()],
        norms=[nn.LayerNorm(4) for _ in range(6)],
        layers=[Block() for _ in range(3)],
        few=[Block() for _ in range(2)],
    )
    path, blocks = find_blocks(root)
    assert path == "body.layers"
    assert blocks is root.body.layers


@pytest.mark.parametrize(
    "lists",
    [
        {"layers": [Block(), Other()]},
        {"layers": [nn.LayerNorm(4), nn.LayerNorm(4)]},
        {},
    ],
    ids=["two classes", "no linear layers", "no list"],
)
def test_models_without_such_a_list_are_refused(lists):
    with pytest.raises(UnsupportedScheme, match="no list of decoder blocks"):
        find_blocks(model(**lists))


class Tied(nn.Module):
    """One parameter under two names, computed and empty buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("steps", torch.arange(5) / 2)
        self.register_buffer("room", torch.empty(3, 4).fill_(7))


def test_buffers_are_computed_and_parameters_are_not():
    with parameters_on_meta():
        made = Tied()
    assert made.words.weight.is_meta
    assert made.head.weight is made.words.weight
    assert made.steps.tolist() == [0, 0.5, 1, 1.5, 2]
    assert made.room.unique().tolist() == [7]
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("size", [(2**40, 2**10), ((2**40, 2**10),)])
def test_parameters_larger_than_any_memory(size):
    with parameters_on_meta():
        assert torch.empty(*size).is_meta
        assert torch.empty(size=(LARGE + 1,)).is_meta
        assert not torch.empty(LARGE // 1024).is_meta
        linear = nn.Linear(2**20, 2**24)
    assert linear.weight.shape == (2**24, 2**20)
