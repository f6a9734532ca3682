"""Models of any shape are run with their blocks out, or refused with a sentence."""

from __future__ import annotations

import json
import sys
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vllm_quantkit.errors import CheckpointError, UnsupportedScheme
from vllm_quantkit.quantize.model.block_calls import BlockCaller, TensorPool
from vllm_quantkit.quantize.model.model_shell import ModelShell


class Block(nn.Module):
    """Returns a tensor, or a tuple that starts with it."""

    def __init__(self, *, tuples: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.tuples = tuples

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        out = hidden_states + self.linear(hidden_states)
        return (out, None) if self.tuples else out


class Model(nn.Module):
    """A language model of a few blocks.

    Args:
        blocks: how many.
        tuples: what they return.
        named: hidden states are a named argument.
    """

    def __init__(self, blocks: int = 3, *, tuples: bool = False, named: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block(tuples=tuples) for _ in range(blocks))
        self.head = nn.Linear(8, 16)
        self.tuples = tuples
        self.named = named

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden = self.embedding(input_ids)
        for index, block in enumerate(self.blocks):
            arguments = self.arguments(index, hidden, attention_mask)
            if self.named:
                hidden = block(hidden_states=hidden, **arguments)
            else:
                hidden = block(hidden, **arguments)
            hidden = hidden[0] if self.tuples else hidden
            hidden = self.between(index, hidden)
        return SimpleNamespace(logits=self.head(hidden))

    def arguments(self, index: int, hidden: Tensor, mask: Tensor | None) -> dict[str, Any]:
        return {"mask": mask, "index": index}

    def between(self, index: int, hidden: Tensor) -> Tensor:
        return hidden


IDS = torch.arange(12).view(2, 6)


@torch.no_grad()
@pytest.mark.parametrize("tuples", [False, True])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_same_logits(blocks, named, tuples):
    model = Model(blocks, tuples=tuples, named=named)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones(2, 6)}
    caller = BlockCaller(model, list(model.blocks))
    hidden, calls = caller.enter(inputs)
    assert torch.equal(hidden, model.embedding(IDS))
    assert [call.kwargs["index"] for call in calls] == list(range(blocks))
    for call, block in zip(calls, model.blocks, strict=True):
        hidden = call.run(block, hidden)
    expected = model(**inputs).logits
    assert torch.equal(caller.logits(hidden, inputs), expected)
    assert "forward" not in vars(model.blocks[0])


class SharesState(Model):
    """Blocks write into an object that later blocks read."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def arguments(self, index: int, hidden: Tensor, mask: Tensor | None) -> dict[str, Any]:
        return {"state": self.state}


class SharesFirstOutput(Model):
    """Later blocks read what an earlier one returned."""

    def arguments(self, index: int, hidden: Tensor, mask: Tensor | None) -> dict[str, Any]:
        if index == 1:
            self.first = hidden
        return {"first": (1, self.first) if index > 1 else None}


class ChangesBetween(Model):
    """Something is done to hidden states between two blocks."""

    def between(self, index: int, hidden: Tensor) -> Tensor:
        return hidden * 2


class SkipsBlocks(Model):
    """A block does not always run."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden = self.embedding(input_ids)
        hidden = self.blocks[2](self.blocks[0](hidden))
        return SimpleNamespace(logits=self.head(hidden))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (SharesState({}), r"block 0 is given 'state' \(dict\)"),
        (SharesState(UserDict()), r"block 0 is given 'state' \(UserDict\)"),
        (SharesState([]), r"block 0 is given 'state' \(list\)"),
        (SharesFirstOutput(), r"block 2 is given 'first' \(Tensor\)"),
        (ChangesBetween(), "block 1 does not read what the one before it returns"),
        (SkipsBlocks(), "block 2 runs after 1 blocks"),
    ],
)
def test_models_that_hand_on_more_are_refused(model, said):
    caller = BlockCaller(model, list(model.blocks))
    with pytest.raises(UnsupportedScheme, match=said):
        caller.enter({"input_ids": IDS})
    assert all("forward" not in vars(block) for block in model.blocks)


def test_an_error_of_the_inputs_is_raised_as_it_is():
    model = Model()
    with pytest.raises(IndexError):
        BlockCaller(model, list(model.blocks)).enter({"input_ids": IDS + 16})


def test_equal_tensors_are_one():
    pool, first = TensorPool(), torch.ones(3, 4)
    assert pool.shared(first) is first
    assert pool.shared((torch.ones(3, 4), 1))[0] is first
    for other in (torch.ones(4, 3), torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.float64)):
        assert pool.shared(other) is other
    assert pool.shared(torch.ones(4, 3).T) is first
    assert pool.shared("text") == "text"
    del first
    again = torch.ones(3, 4)
    assert pool.shared(again) is again


REMOTE_CODE = """
from types import SimpleNamespace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class ForeignConfig(PreTrainedConfig):
    model_type = "llama-of-our-own"
    hidden_size = 32
    vocab_size = 64


class ForeignBlock(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.mix = nn.Linear(size, size, bias=False)

    def forward(self, x, scale):
        return (x + scale * self.mix(x), None)


class ForeignForCausalLM(PreTrainedModel):
    config_class = ForeignConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList(ForeignBlock(config.hidden_size) for _ in range(3))
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        x = self.words(input_ids)
        for block in self.stack:
            x = block(x, self.scale)[0]
        return CausalLMOutput(logits=self.out(x))
"""


@torch.no_grad()
def test_code_that_comes_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = str(tmp_path / "cache")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "foreign.py").write_text(REMOTE_CODE)
    classes = {"AutoConfig": "ForeignConfig", "AutoModelForCausalLM": "ForeignForCausalLM"}
    config = {
        "model_type": "llama-of-our-own",
        "architectures": ["ForeignForCausalLM"],
        "auto_map": {auto: f"foreign.{name}" for auto, name in classes.items()},
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {f"stack.{index}.mix.weight": torch.randn(32, 32) for index in range(3)}
    weights |= {"words.weight": torch.randn(64, 32), "out.weight": torch.randn(64, 32)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match="trust_remote_code"):
        ModelShell.open(folder)

    shell = ModelShell.open(folder, trust_remote_code=True)
    assert not shell.known
    assert [stage.layers for stage in shell.stages(2)] == [("mix",)]
    assert shell.outside() == ("out",)
    ids = torch.arange(10).view(2, 5)
    with shell.open_ends():
        hidden, calls = shell.enter(ids, None)
        for index, call in enumerate(calls):
            with shell.block(index) as block:
                hidden = call.run(block, hidden)
        found = shell.logits(hidden, ids, None)
    x = weights["words.weight"][ids]
    for index in range(3):
        x = x + 0.5 * x @ weights[f"stack.{index}.mix.weight"].T
    expected = x @ weights["out.weight"].T
    # The same sums in float32, perhaps in another order.
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
