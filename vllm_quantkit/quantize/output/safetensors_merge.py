"""Writing safetensors files from parts of other files and tensors, a few MiB at a time.

The format: https://huggingface.co/docs/safetensors. Tensors lie in a file by falling size of their
elements, as the library has them, so that every one is aligned.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vllm_quantkit._safetensors import DTYPES, INDEX, LENGTH_BYTES, TensorHeader

CHUNK_BYTES = 16 * 2**20
"""Bytes that are copied at a time."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The format's name of each dtype."""

Part = TensorHeader | Tensor
"""A tensor where it lies: in a file, or in memory."""

Parts = Mapping[str, Part]
"""Name to tensor."""


@dataclass(frozen=True)
class Shards:
    """Which file holds which tensors.

    Attributes:
        files: file name to its tensors.
    """

    files: Mapping[str, Parts]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(size_of(part) for file in self.files.values() for part in file.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of all files, headers included."""
        return self.total_bytes + sum(len(_header(parts)) for parts in self.files.values())

    def write(self, folder: Path) -> None:
        """Every file, and the index where there are several.

        Raises:
            OSError: as writing files.
        """
        for name, parts in self.files.items():
            write_file(folder / name, parts)
        if len(self.files) > 1:
            write_json(folder / INDEX, self._index())

    def _index(self) -> dict[str, Any]:
        names = sorted((name, file) for file, parts in self.files.items() for name in parts)
        return {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(names)}


def divide(parts: Parts, max_shard_bytes: int) -> Shards:
    """`model.safetensors`, or `model-0000i-of-0000n.safetensors` of at most `max_shard_bytes`.

    Names are taken in order, their numbers as numbers; a tensor is never cut.
    """
    shards: list[dict[str, Part]] = [{}]
    room = max_shard_bytes
    for name in sorted(parts, key=_natural):
        size = size_of(parts[name])
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = parts[name]
        room -= size
    count = len(shards)
    if count == 1:
        return Shards({"model.safetensors": shards[0]})
    return Shards(
        {f"model-{i + 1:05d}-of-{count:05d}.safetensors": shard for i, shard in enumerate(shards)}
    )


def write_file(path: Path, parts: Parts) -> None:
    """One safetensors file, on the disk when this returns; no more than a chunk is held of it.

    Raises:
        OSError: as writing files; nothing is left at `path`.
    """
    try:
        with path.open("wb") as file:
            file.write(_header(parts))
            for part in _in_order(parts).values():
                for chunk in _chunks(part):
                    file.write(chunk)
            flush(file)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Indented, with sorted keys, on the disk when this returns.

    Raises:
        OSError: as writing files; nothing is left at `path`.
    """
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """UTF-8, on the disk when this returns.

    Raises:
        OSError: as writing files; nothing is left at `path`.
    """
    try:
        with path.open("wb") as file:
            file.write(text.encode())
            flush(file)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def flush(file: BinaryIO) -> None:
    """What was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """The names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_of(part: Part) -> int:
    """Bytes of a tensor."""
    return prod(part.shape) * part.dtype.itemsize


def _in_order(parts: Parts) -> dict[str, Part]:
    names = sorted(parts, key=lambda name: (-parts[name].dtype.itemsize, name))
    return {name: parts[name] for name in names}


def _header(parts: Parts) -> bytes:
    """Length and JSON, padded so that the tensors start at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, part in _in_order(parts).items():
        end = start + size_of(part)
        entries[name] = {
            "dtype": NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _chunks(part: Part) -> Iterator[bytes | memoryview]:
    if isinstance(part, TensorHeader):
        yield from _file_chunks(part)
        return
    flat = part.detach().contiguous().reshape(-1).view(torch.uint8)
    for block in flat.split(CHUNK_BYTES):
        yield memoryview(block.cpu().numpy())


def _file_chunks(header: TensorHeader) -> Iterator[bytes]:
    left = size_of(header)
    with header.file.open("rb") as file:
        file.seek(header.offset)
        while left:
            chunk = file.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise OSError(f"{header.file} ended {left} bytes early while it was read")
            left -= len(chunk)
            yield chunk


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Orders `layers.2` before `layers.10`."""
    pieces: Iterable[str] = re.split(r"(\d+)", name)
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in pieces)
