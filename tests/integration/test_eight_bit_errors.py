"""8-bit checkpoints whose scales no kernel can use, or that do not fit the model's layers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.integration.eight_bit import CASES, write_quantised
from tests.integration.engines import EngineFailed, EngineHost
from tests.tiny_models import create_tiny_model

pytestmark = pytest.mark.engine

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A static FP8 checkpoint with nothing wrong."""
    folder = tmp_path_factory.mktemp("eight_bit")
    model = create_tiny_model("llama", folder / "model")
    write_quantised(CASES["fp8 static per tensor"], model, folder / "fp8")
    return folder / "fp8"


def changed(name: str, value: float) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[f"{LAYER}.{name}"].fill_(value)


SPOILT: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "scale is NaN": (changed("weight_scale", torch.nan), f"{LAYER}.weight_scale has the scale nan"),
    "scale is infinite": (changed("weight_scale", torch.inf), "has the scale inf"),
    "scale is zero": (changed("weight_scale", 0.0), "has the scale 0.0"),
    "scale is negative": (changed("weight_scale", -1.0), "has the scale -1.0"),
    "static scale is zero": (changed("input_scale", 0.0), f"{LAYER}.input_scale has the scale 0.0"),
    "three scales for one layer": (
        lambda tensors: tensors.update({f"{LAYER}.weight_scale": torch.ones(3)}),
        f"{LAYER}.weight_scale in ",
    ),
    "no scale": (
        lambda tensors: tensors.pop(f"{LAYER}.input_scale"),
        f"{LAYER}.input_scale is missing",
    ),
    "bits of another format": (
        lambda tensors: tensors.update(
            {f"{LAYER}.weight": tensors[f"{LAYER}.weight"].view(torch.float8_e4m3fnuz)}
        ),
        "Its bits mean half of what they do in torch.float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_checkpoint_is_refused(fault, sound, tmp_path, engines: EngineHost):
    change, expected = SPOILT[fault]
    folder = tmp_path / "spoilt"
    shutil.copytree(sound, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(EngineFailed) as refusal:
        engines.run(folder, "quantkit-fp8", [])

    assert expected in str(refusal.value)


def test_a_checkpoint_of_another_method_is_refused(sound, engines: EngineHost):
    with pytest.raises(EngineFailed) as refusal:
        engines.run(sound, "quantkit-smoothquant", [])

    assert "--quantization quantkit-smoothquant serves INT8 weights" in str(refusal.value)
    assert "Use --quantization quantkit, which picks the method" in str(refusal.value)


def test_options_for_16_bit_models_are_refused(sound, engines: EngineHost):
    options = {"additional_config": {"quantkit": {"ignore": [".*"]}}}
    with pytest.raises(EngineFailed) as refusal:
        engines.run(sound, "quantkit-fp8", [], **options)

    assert "this checkpoint is quantised already" in str(refusal.value)
