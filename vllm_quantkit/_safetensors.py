"""Headers of a checkpoint's safetensors files, checked without reading a weight.

A safetensors file is 8 bytes of header length (little-endian), that many bytes of JSON
(name to dtype, shape and byte range), then the tensors' bytes without gaps:
https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from vllm_quantkit.errors import CheckpointError, ConfigError

INDEX = "model.safetensors.index.json"
LENGTH_BYTES = 8

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}

CONFIG_FILES = ("quantize_config.json", "quant_config.json")
"""Where older producers put what is now `quantization_config` in config.json."""

DOWNLOAD = "Download the file again, or save the model again."


@dataclass(frozen=True)
class TensorHeader:
    """What a file says about a tensor.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        file: the file it is in.
        offset: where its bytes start in the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int = field(default=0, compare=False)

    def read_bytes(self) -> bytes:
        """The bytes of a tiny tensor; none if the file is not there to read."""
        if not self.file.is_file():
            return b""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(prod(self.shape) * self.dtype.itemsize)

    def read_integers(self) -> list[int]:
        """The values of a tiny int64 or int32 tensor; empty if the file is not there to read."""
        data = self.read_bytes()
        return torch.frombuffer(bytearray(data), dtype=self.dtype).tolist() if data else []


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of the checkpoint in `folder`, by name.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, a tensor is stored twice, or the
            index names a tensor that its file lacks.
    """
    index = read_index(folder)
    files = sorted(set(index.values())) if index else _find_files(folder)
    headers: dict[str, TensorHeader] = {}
    for name in files:
        for tensor, header in read_file_headers(folder / name).items():
            if tensor in headers:
                raise CheckpointError(
                    f"The tensor {tensor!r} is stored twice, in {headers[tensor].file.name} and "
                    f"{name}. Remove the file that is left over from an older save."
                )
            headers[tensor] = header
    for tensor, name in index.items():
        if tensor not in headers or headers[tensor].file.name != name:
            raise CheckpointError(
                f"{INDEX} says that {name} holds the tensor {tensor!r}, but it does not. {DOWNLOAD}"
            )
    return headers


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name to file name, as the index says; empty without an index.

    Raises:
        CheckpointError: the index is unreadable, or names a file that is missing.
    """
    path = folder / INDEX
    if not path.is_file():
        return {}
    content = _read_json(path)
    index = content.get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise CheckpointError(
            f"{path} has no 'weight_map' of tensor names to file names. {DOWNLOAD}"
        )
    for name in sorted(set(index.values())):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{INDEX} names the file {name}, which is missing from {folder}. "
                "Download the missing file."
            )
    return index


def read_file_headers(path: Path) -> dict[str, TensorHeader]:
    """Every tensor of one file, by name.

    Raises:
        CheckpointError: the file is truncated or corrupt; gives bytes found and expected.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(LENGTH_BYTES)
        _refuse_pointer(path, start)
        end = LENGTH_BYTES + int.from_bytes(start, "little")
        if size < LENGTH_BYTES or end > size:
            expected = max(end, LENGTH_BYTES) if size >= LENGTH_BYTES else LENGTH_BYTES
            raise _corrupt(path, f"it has {size} bytes, but its header alone needs {expected}")
        text = stream.read(end - LENGTH_BYTES)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        headers = {name: _header(path, name, entry, end) for name, entry in entries.items()}
        data_end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _corrupt(path, f"its header is not valid ({error})") from None
    if size != end + data_end:
        raise _corrupt(path, f"it has {size} bytes, but its header expects {end + data_end}")
    return headers


def read_quantization_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's quantisation config: in config.json, else in a file of its own.

    Raises:
        ConfigError: there is none.
        CheckpointError: a file is not valid JSON.
    """
    for name, key in (("config.json", "quantization_config"), *((n, None) for n in CONFIG_FILES)):
        if (folder / name).is_file():
            content = _read_json(folder / name)
            found = content.get(key) if key else content
            if isinstance(found, dict):
                return found
    raise ConfigError(
        f"{folder} has no quantisation config: neither 'quantization_config' in config.json nor "
        f"{' or '.join(CONFIG_FILES)}. Copy it from the model's source, or serve the model with "
        "a method that quantises at load."
    )


def _header(path: Path, name: str, entry: Mapping[str, Any], data_start: int) -> TensorHeader:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path} stores {name!r} as {entry['dtype']!r}, which is none of "
            f"{', '.join(DTYPES)}. Save the model again with one of these."
        )
    begin, end = entry["data_offsets"]
    header = TensorHeader(
        shape=tuple(int(size) for size in entry["shape"]),
        dtype=DTYPES[entry["dtype"]],
        file=path,
        offset=data_start + begin,
    )
    needed = prod(header.shape) * header.dtype.itemsize
    if end - begin != needed:
        raise _corrupt(path, f"{name!r} has {end - begin} bytes, but its shape needs {needed}")
    return header


def _find_files(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.glob("model*.safetensors"))
    names = names or sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise CheckpointError(
            f"{folder} holds no safetensors file. Point --model at a folder with "
            "model.safetensors, or convert the weights to safetensors."
        )
    _refuse_gaps(folder, names)
    return names


def _refuse_gaps(folder: Path, names: Iterable[str]) -> None:
    """Refuse `model-00001-of-00003.safetensors` without its siblings."""
    found: dict[tuple[str, int], set[int]] = defaultdict(set)
    for name in names:
        if match := re.fullmatch(r"(.+)-(\d+)-of-(\d+)\.safetensors", name):
            found[match[1], int(match[3])].add(int(match[2]))
    for (stem, total), numbers in found.items():
        if missing := set(range(1, total + 1)) - numbers:
            raise CheckpointError(
                f"{folder} holds {len(numbers)} of the {total} files {stem}-*-of-{total:05d}; "
                f"number {min(missing)} is missing. Download the missing files."
            )


def _refuse_pointer(path: Path, start: bytes) -> None:
    if start == b"version ":
        raise _corrupt(path, "it is a Git LFS pointer, not the weights")


def _corrupt(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or corrupt: {why}. {DOWNLOAD}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). {DOWNLOAD}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object. {DOWNLOAD}")
    return content
