"""A model folder made of another: tensors exchanged, config.json updated, the rest comes along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_quantkit._safetensors import CONFIG_FILES, TensorHeader, read_headers
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.quantize.output.safetensors_merge import (
    Part,
    Shards,
    divide,
    flush,
    flush_folder,
    write_json,
    write_text,
)

WEIGHT_ENDINGS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".msgpack",
    ".index.json",
)
"""Endings of files that hold or index weights, of this kind or another."""

REPORT = "quantkit_report.json"
"""What a run of the quantiser says of its result."""

LEFT_BEHIND = frozenset({"config.json", REPORT, *CONFIG_FILES})
"""Files that say what the source was."""


class ModelFolder:
    """What a model folder will hold.

    Args:
        source: a transformers model folder with safetensors weights.
        replaced: names of the source's tensors that do not come along.
        new: name to a tensor that the source does not have, or that is replaced.
        config: keys to set in config.json.
        extra_files: path inside the folder to a text; in place of the source's file, if it has one.
        max_shard_bytes: of a file of weights, where no single tensor is larger.

    Raises:
        CheckpointError: `source` has no safetensors or lacks a tensor to replace, a tensor would be
            stored twice, or a file of the source is damaged.
    """

    def __init__(
        self,
        source: Path,
        replaced: Collection[str],
        new: Mapping[str, Part],
        config: Mapping[str, Any],
        extra_files: Mapping[str, str],
        max_shard_bytes: int,
    ) -> None:
        kept = _kept_tensors(source, replaced, new)
        self.shards: Shards = divide({**kept, **new}, max_shard_bytes)
        self._files = dict(_other_files(source))
        self._extra_files = extra_files
        self._config = {**_read_config(source), **config}

    @property
    def bytes(self) -> int:
        """What it takes on the disk, but for what file systems add."""
        copied = sum(path.stat().st_size for path in self._files.values())
        texts = sum(len(text.encode()) for text in self._extra_files.values())
        return self.shards.file_bytes + copied + texts + len(json.dumps(self._config))

    def write(self, folder: Path) -> None:
        """Everything, on the disk when this returns; `folder` must be empty.

        Raises:
            OSError: as writing files.
        """
        for name, path in self._files.items():
            _copy(path, folder / name)
        self.shards.write(folder)
        write_json(folder / "config.json", self._config)
        for name, text in self._extra_files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder / name, text)
        for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            flush_folder(path)


def _kept_tensors(
    source: Path, replaced: Collection[str], new: Mapping[str, Part]
) -> dict[str, TensorHeader]:
    headers = read_headers(source)
    if missing := sorted(set(replaced) - headers.keys()):
        raise CheckpointError(
            f"{source} has no tensor {missing[0]!r} ({len(missing)} such names): its weights are "
            "named differently from the model's modules; load and save it with transformers first."
        )
    kept = {name: header for name, header in headers.items() if name not in set(replaced)}
    if twice := sorted(kept.keys() & new.keys()):
        raise CheckpointError(
            f"{source} has the tensor {twice[0]!r} already, which the quantised layers also store "
            "under this name. Quantise a model in 16 bits."
        )
    return kept


def _read_config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Point to a transformers model folder."
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object. Download the file again.")
    return config


def _other_files(source: Path) -> Iterator[tuple[str, Path]]:
    """Tokenizer, generation config, chat template, remote code, licence: all but weights.

    A folder inside with weights is another form of the model and stays behind, and so do hidden
    files and compiled code.
    """
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__" or path.name in LEFT_BEHIND:
            continue
        if path.is_file() and not path.name.endswith(WEIGHT_ENDINGS):
            yield path.name, path
        elif path.is_dir():
            inside = dict(_other_files(path))
            if not any(file.name.endswith(WEIGHT_ENDINGS) for file in path.rglob("*")):
                yield from ((f"{path.name}/{name}", file) for name, file in inside.items())


def _copy(source: Path, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, out.open("wb") as written:
        shutil.copyfileobj(read, written)
        flush(written)
