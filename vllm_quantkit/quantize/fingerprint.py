"""What decides the bytes of a quantised model: a run may go on only where all of it is the same."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from vllm_quantkit.quantize.calibration import TokenSets
from vllm_quantkit.quantize.output.report import versions
from vllm_quantkit.quantize.recipes.recipe_file import Recipe
from vllm_quantkit.quantize.run_options import RunOptions


def fingerprint(
    source: Path,
    recipe: Recipe,
    sets: TokenSets | None,
    run: RunOptions,
    precision: torch.dtype,
) -> dict[str, Any]:
    """All that decides the result, as JSON.

    Weights count by the headers and sizes of their files: hashing a large model takes minutes.
    """
    return {
        "model": _folder_digests(source),
        "recipe": recipe.model_dump(mode="json"),
        "calibration": None if sets is None else sets.calibration.fingerprint,
        "held_out": None if sets is None else sets.held_out.fingerprint,
        "precision": str(precision),
        "batch_tokens": run.batch_tokens,
        "statistics_gib": run.statistics_gib,
        "threads": torch.get_num_threads(),
        "versions": versions(run.torch_device()),
    }


def _folder_digests(source: Path) -> dict[str, str]:
    """config.json by its content, each weight file by its size and header."""
    digests = {"config.json": hashlib.sha256((source / "config.json").read_bytes()).hexdigest()}
    for path in sorted(source.glob("*.safetensors")):
        digest = hashlib.sha256(str(path.stat().st_size).encode())
        with path.open("rb") as file:
            length = file.read(8)
            digest.update(length + file.read(int.from_bytes(length, "little")))
        digests[path.name] = digest.hexdigest()
    return digests
