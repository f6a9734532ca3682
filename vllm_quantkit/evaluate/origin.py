"""What a model's folder tells of how it was made: its base, its calibration, its length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import AutoConfig

from vllm_quantkit.checkpoint import read_quantization_config
from vllm_quantkit.errors import CheckpointError, ConfigError
from vllm_quantkit.quantize.hub import model_folder
from vllm_quantkit.quantize.output.report import REPORT_FILE, CalibrationSummary
from vllm_quantkit.spec import Frozen

UNLIMITED = 1 << 30
"""Tokens that a model takes whose config names no maximum."""


class Origin(Frozen):
    """What is known of a model.

    Attributes:
        is_quantised: True where config.json says how the weights are stored.
        max_length: the most tokens that it takes.
        bases: names or folders of the model it was made of, the likeliest first.
        calibration: what it was calibrated on; None where nothing is known of that.
    """

    is_quantised: bool
    max_length: int
    bases: tuple[str, ...] = ()
    calibration: CalibrationSummary | None = None


def read_origin(folder: Path) -> Origin:
    """What config.json and quantkit_report.json say.

    Raises:
        CheckpointError: a file cannot be read.
    """
    config = AutoConfig.from_pretrained(folder)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    report = _report(folder)
    near = find_near(folder, str(report["model"])) if report.get("model") else None
    bases = [str(near)] if near is not None else []
    bases += [str(report["base_model"])] if report.get("base_model") else []
    return Origin(
        is_quantised=is_quantised(folder),
        max_length=int(limit or UNLIMITED),
        bases=tuple(bases),
        calibration=_calibration(report, folder),
    )


def is_quantised(folder: Path) -> bool:
    """True where config.json says how the weights are stored."""
    try:
        read_quantization_config(folder)
    except ConfigError:
        return False
    return True


def find_base(origin: Origin, model: str, against: str | None, quantises: bool) -> tuple[str, str]:
    """The 16-bit model to compare with, or an empty string and why there is none.

    Args:
        origin: of the model.
        model: as the user names it.
        against: what the user wants to compare with.
        quantises: True where the engine changes the model (weights or cache) as it loads it.

    Raises:
        CheckpointError: there is no such model.
    """
    if against is not None:
        model_folder(against)
        return against, ""
    if not origin.is_quantised:
        why = f"{model} is served as it is, so there is nothing to compare it with"
        return (model, "") if quantises else ("", why)
    for base in origin.bases:
        try:
            return str(model_folder(base)), ""
        except CheckpointError as error:
            return "", f"its 16-bit model cannot be loaded ({error})"
    return "", "its report, if there is one, names no 16-bit model that is here"


def find_near(folder: Path, name: str) -> Path | None:
    """A file or folder of this name, here or near the model's folder; None where there is none."""
    given, beside = Path(name).expanduser(), folder.resolve().parent
    places = (given, folder / given, beside / given, beside / "data" / given)
    return next((place for place in places if place.exists() and place.resolve() != folder), None)


def _report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): delete it.") from error
    return content if isinstance(content, dict) else {}


def _calibration(report: dict[str, Any], folder: Path) -> CalibrationSummary | None:
    if report.get("calibration") is None:
        return None
    try:
        return CalibrationSummary.model_validate(report["calibration"])
    except ValidationError as error:
        raise CheckpointError(
            f"calibration in {folder / REPORT_FILE} is not as this version writes it "
            f"({error.errors()[0]['msg']}): delete it, and pass --text FILE."
        ) from error
