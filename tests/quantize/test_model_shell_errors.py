"""What a model folder may lack, and the sentence that says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_models import create_tiny_model
from vllm_quantkit.errors import CheckpointError, UnsupportedScheme
from vllm_quantkit.quantize.model.model_shell import ModelShell

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    return create_tiny_model("llama", tmp_path / "model", **sizes)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    stored = load_file(folder / WEIGHTS)
    change(stored)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_missing_tensor(folder):
    change_tensors(folder, lambda stored: stored.pop(UP))
    with pytest.raises(CheckpointError, match=f"{folder} has no tensor '{UP}', which Llama"):
        ModelShell.open(folder)


@pytest.mark.parametrize("expert", [0, 3])
def test_missing_expert(expert, tmp_path):
    folder = create_tiny_model("mixtral", tmp_path, hidden_size=64, intermediate_size=96)
    name = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"
    change_tensors(folder, lambda stored: stored.pop(name))
    missing = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
    with pytest.raises(CheckpointError, match=f"no tensor '{missing}'"):
        ModelShell.open(folder)


def test_missing_end(folder):
    change_tensors(folder, lambda stored: stored.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"no tensor 'model.norm.weight'"):
        ModelShell.open(folder)


def test_other_shape(folder):
    change_config(folder, intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"shape \[96, 64\], but .* needs \[128, 64\]"):
        ModelShell.open(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weight_that_is_not_finite(folder, value):
    change_tensors(folder, lambda stored: stored[UP].__setitem__((3, 5), value))
    shell = ModelShell.open(folder)
    with shell.block(0):
        pass
    expected = f"{UP} in {folder / WEIGHTS} has 1 values that are NaN or infinite"
    with pytest.raises(CheckpointError, match=expected), shell.block(1):
        pass


def test_truncated_file(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} is truncated or corrupt: it has"):
        ModelShell.open(folder)


def test_file_truncated_later(folder):
    shell = ModelShell.open(folder)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 20])
    expected = rf"{WEIGHTS} ends after \d+ of the \d+ bytes of"
    with pytest.raises(CheckpointError, match=expected), shell.block(1):
        pass


def test_file_removed_later(folder):
    shell = ModelShell.open(folder)
    (folder / WEIGHTS).unlink()
    expected = rf"in {folder / WEIGHTS} cannot be read"
    with pytest.raises(CheckpointError, match=expected), shell.block(0):
        pass


def test_missing_shard(folder, tmp_path):
    split = tmp_path / "split"
    split.mkdir()
    stored = load_file(folder / WEIGHTS)
    names = sorted(stored)
    for number, part in ((1, names[:5]), (2, names[5:])):
        file = split / f"model-0000{number}-of-00002.safetensors"
        save_file({name: stored[name] for name in part}, file, metadata={"format": "pt"})
    (split / "config.json").write_bytes((folder / "config.json").read_bytes())
    ModelShell.open(split)
    (split / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="number 2 is missing"):
        ModelShell.open(split)


def test_only_pickled_weights(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds pytorch_model.bin but no safetensors file"):
        ModelShell.open(folder)


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        ModelShell.open(folder)


def test_quantised_model(folder):
    change_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(UnsupportedScheme, match=r"is quantised already \(awq\)"):
        ModelShell.open(folder)


def test_weights_in_8_bits(folder):
    eight = torch.zeros(96, 64, dtype=torch.float8_e4m3fn)
    change_tensors(folder, lambda stored: stored.update({UP: eight}))
    with pytest.raises(CheckpointError, match=rf"{UP} in .* is stored as torch.float8_e4m3fn"):
        ModelShell.open(folder)


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        ModelShell.open(folder)


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-model"}', "{}"])
def test_config_that_cannot_be_used(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json cannot be used"):
        ModelShell.open(folder)


def test_no_language_model(folder):
    change_config(folder, model_type="vit", architectures=["ViTModel"])
    with pytest.raises(UnsupportedScheme, match="of type 'vit', which transformers cannot build"):
        ModelShell.open(folder)


def test_layers_that_are_no_linear_layers(tmp_path):
    folder = create_tiny_model("gpt2", tmp_path)
    with pytest.raises(UnsupportedScheme, match=r"GPT2LMHeadModel .* GPT-2's Conv1D"):
        ModelShell.open(folder)
