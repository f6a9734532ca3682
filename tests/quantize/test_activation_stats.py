"""Collecting the largest input of every channel, and the file it is kept in."""

import re

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.quantize.activation_stats import (
    collect_activation_stats,
    read_activation_stats,
    write_activation_stats,
)

STATS = {"a.b": torch.tensor([1.0, 0.0, 3.5]), "c": torch.tensor([2.0])}


def test_every_linear_layers_largest_input_over_all_batches(llama):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    batches = torch.randint(4, 500, (2, 3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = [model(batch, output_hidden_states=True).hidden_states for batch in batches]
        norm = model.model.layers[0].input_layernorm
        first = norm(torch.stack([hidden[0] for hidden in states]))
    head = torch.stack([hidden[-1] for hidden in states])

    stats = collect_activation_stats(model, batches)

    assert len(stats) == 2 * 7 + 1
    for projection in "qkv":
        name = f"model.layers.0.self_attn.{projection}_proj"
        torch.testing.assert_close(stats[name], first.abs().amax((0, 1, 2)))
    torch.testing.assert_close(stats["lm_head"], head.abs().amax((0, 1, 2)))


def test_a_file_holds_what_was_written(tmp_path):
    write_activation_stats(STATS, tmp_path / "stats", tokens=7)

    found = read_activation_stats(tmp_path / "stats")

    assert found.keys() == STATS.keys()
    assert all(torch.equal(found[name], STATS[name]) for name in STATS)
    assert [path.name for path in tmp_path.iterdir()] == ["stats"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_values_that_are_no_magnitudes_are_refused(value, tmp_path):
    write_activation_stats({**STATS, "c": torch.tensor([value])}, tmp_path / "stats", tokens=7)

    with pytest.raises(CheckpointError, match=r"statistics of c have a value that is negative or"):
        read_activation_stats(tmp_path / "stats")


def test_other_files_are_refused(tmp_path):
    how = re.escape("collect them with quantkit calibrate MODEL --calibration TEXT --out FILE.")
    other, damaged = tmp_path / "other", tmp_path / "damaged"
    save_file({"weight": torch.ones(2)}, other)
    write_activation_stats(STATS, damaged, tokens=7)
    damaged.write_bytes(damaged.read_bytes()[:-4])

    with pytest.raises(CheckpointError, match=f"other holds no activation statistics; {how}"):
        read_activation_stats(other)
    with pytest.raises(CheckpointError, match=f"damaged cannot be read: .*; {how}"):
        read_activation_stats(damaged)
