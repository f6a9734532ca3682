"""config.json and the headers of safetensors files, from a folder or from the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from vllm_quantkit._safetensors import CONFIG_FILES, DTYPES, TensorHeader, read_headers
from vllm_quantkit.errors import CheckpointError

CONFIG = "config.json"

QUANTIZATION = "quantization_config"


@dataclass(frozen=True)
class Source:
    """What a model's files say.

    Attributes:
        config: config.json, `quantization_config` included wherever it was stored.
        tensors: every tensor by name; empty where there are no safetensors files.
        local: True where the files can be read.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]
    local: bool


def read_folder(folder: Path) -> Source:
    """The model in `folder`, which may hold config.json alone.

    Raises:
        CheckpointError: there is no config.json, or a file is malformed.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} has no config.json. Give the folder of a model saved by transformers, or a "
            "model's name on the hub."
        )

    def read(name: str) -> Mapping[str, Any] | None:
        return _read_json(folder / name) if (folder / name).is_file() else None

    has_weights = any(folder.glob("*.safetensors"))
    return Source(_config(read), read_headers(folder) if has_weights else {}, local=True)


def read_hub(model: str, revision: str | None) -> Source:
    """The model of that name on the hub; of its weights, headers only.

    Without the network, what an earlier download left on this machine.

    Raises:
        CheckpointError: there is no such model, it is gated, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
    )

    def read(name: str) -> Mapping[str, Any] | None:
        try:
            return _read_json(Path(hf_hub_download(model, name, revision=revision)))
        except LocalEntryNotFoundError:  # the hub was not asked
            raise
        except EntryNotFoundError:
            return None

    try:
        config = _config(read)
        found = HfApi().get_safetensors_metadata(model, revision=revision)
    except NotASafetensorsRepoError:
        return Source(config, {}, local=False)
    except CheckpointError:
        raise
    except Exception as error:
        cached = _cached_folder(model, revision)
        if cached is not None:
            return read_folder(cached)
        raise _unreachable(model, error) from error
    tensors = {
        name: _header(f"{model}/{file}", name, tensor)
        for file, metadata in found.files_metadata.items()
        for name, tensor in metadata.tensors.items()
    }
    return Source(config, tensors, local=False)


def _config(read: Callable[[str], Mapping[str, Any] | None]) -> dict[str, Any]:
    """config.json, and the quantisation config that older producers put beside it."""
    config = read(CONFIG)
    if config is None:
        raise CheckpointError(
            "the model has no config.json, so it is not one that transformers or vLLM loads. Give "
            "a folder or a hub model in the format of transformers."
        )
    if QUANTIZATION in config:
        return dict(config)
    for name in CONFIG_FILES:
        beside = read(name)
        if beside is not None:
            return {**config, QUANTIZATION: dict(beside)}
    return dict(config)


def _header(file: str, name: str, tensor: Any) -> TensorHeader:
    """What the hub's header says about a tensor.

    Raises:
        CheckpointError: its dtype is unknown, or its bytes do not fit its shape.
    """
    if tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"{file} stores {name!r} as {tensor.dtype!r}, which is none of {', '.join(DTYPES)}."
        )
    begin, end = tensor.data_offsets
    header = TensorHeader(tuple(tensor.shape), DTYPES[tensor.dtype], Path(file))
    needed = prod(header.shape) * header.dtype.itemsize
    if end - begin != needed:
        raise CheckpointError(
            f"{file} is corrupt: {name!r} has {end - begin} bytes, but its shape needs {needed}."
        )
    return header


def _cached_folder(model: str, revision: str | None) -> Path | None:
    """The folder that an earlier download of the model made, if config.json is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, CONFIG, revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _unreachable(model: str, error: Exception) -> CheckpointError:
    """Why the hub gave nothing, in a sentence."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return CheckpointError(
            f"{model!r} is gated: ask for access on its page on the hub, then log in with "
            "`hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"{model!r} has no such revision on the hub: check its name.")
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return CheckpointError(
            f"{model!r} is neither a folder here nor a model on the hub: check the name, or log in "
            "with `hf auth login` if it is private."
        )
    what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(
        f"{model!r} is no folder here, and the hub cannot be asked for it ({what}): check the "
        "network, or give a folder."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}). Download the file again, or save the model again."
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object. Download the file again.")
    return content
