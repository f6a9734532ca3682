"""The pair of models that the demo compares: 16-bit and AWQ, shipped or made once and kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(".cache/demo")
TINY_LM = Path("examples/tiny-lm")
CALIBRATION = TINY_LM / "data/calibration.txt"


@dataclass(frozen=True)
class DemoModels:
    """Folders of the two models.

    Attributes:
        original: 16-bit.
        quantized: AWQ, 4 bits.
    """

    original: str
    quantized: str

    @property
    def original_bytes(self) -> int:
        """Bytes of the 16-bit weights."""
        return weight_bytes(self.original)

    @property
    def quantized_bytes(self) -> int:
        """Bytes of the AWQ weights."""
        return weight_bytes(self.quantized)


def prepare(model: str, progress: Callable[[str], None]) -> DemoModels:
    """The models for `--model`: the shipped pair, or a folder or hub model quantised once.

    Raises:
        ValueError: the model can be neither found nor quantised; says why.
    """
    if Path(model) == TINY_LM:
        return DemoModels(str(TINY_LM / "bf16"), str(TINY_LM / "awq"))
    folder = Path(model) if Path(model).is_dir() else _download(model, progress)
    quantized = CACHE / f"{model.strip('/').replace('/', '--')}-awq"
    if not quantized.exists():
        progress(f"Quantising {model} to 4 bits (once; kept in {quantized}) ...")
        _quantize(folder, quantized)
    return DemoModels(str(folder), str(quantized))


def weight_bytes(folder: str) -> int:
    """Bytes of a model folder's safetensors files."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _download(model: str, progress: Callable[[str], None]) -> Path:
    from vllm_quantkit.quantize.hub import model_folder

    progress(f"Fetching {model} ...")
    return model_folder(model)


def _quantize(source: Path, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = ("--scheme", "awq", "--format", "awq", "--group-size", "64")
    text = ("--calibration", str(CALIBRATION), "--samples", "64", "--length", "512")
    options = (*recipe, *text, "--allow-few-samples", "--held-out", "8")
    command = [
        sys.executable,
        "-m",
        "vllm_quantkit.cli",
        "quantize",
        str(source),
        "--out",
        str(out),
    ]
    if subprocess.run([*command, *options], env={**os.environ}, check=False).returncode != 0:
        raise ValueError(f"{source} could not be quantised; the lines above say why.")
