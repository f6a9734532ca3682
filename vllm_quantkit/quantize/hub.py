"""A model's folder, from its path or its name on the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vllm_quantkit.errors import CheckpointError

FILES = ("*.json", "*.jinja", "*.safetensors", "*.model", "*.txt", "*.py", "*.md", "LICENSE*")
"""What a model folder is made of, other forms of its weights aside."""


def model_folder(model: str) -> Path:
    """The folder `model`, or the hub's model of that name, downloaded where it is not yet.

    Raises:
        CheckpointError: there is neither.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model!r} is neither a folder nor a model that the hub gave ({error}): check the "
            "name and the network, or give a folder."
        ) from error


def hub_name(model: str) -> str | None:
    """The model's name on the hub; None for a folder."""
    return None if Path(model).is_dir() else model
