"""Writing a checkpoint: a source folder with some of its tensors exchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.formats import Role, get_format
from vllm_quantkit.spec import LayerShape, SchemeSpec

WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")
"""Endings of files that hold or index weights; every other file is copied as it is."""

INDEX = "model.safetensors.index.json"

Exchange = Mapping[str, Mapping[str, Tensor]]
"""Name of a source tensor to the tensors, by full name, that take its place."""


def refuse_existing(out: Path) -> None:
    """Nothing is overwritten.

    Raises:
        CheckpointError: `out` exists.
    """
    if out.exists():
        raise CheckpointError(f"{out} already exists: remove it, or write to another folder.")


def encode_layer(
    weight: QuantizedWeight, scheme: SchemeSpec, inputs: Mapping[Role, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of a layer as its dialect stores them, by their name behind the layer's.

    Args:
        weight: the layer's codes.
        scheme: how they are stored.
        inputs: INPUT_SCALE and INPUT_ZERO of static activations.
    """
    out_features, in_features = weight.codes.shape
    canonical = {
        Role.CODES: weight.codes,
        Role.SCALES: weight.scales,
        Role.ZEROS: weight.zeros,
        Role.GROUP_INDEX: weight.group_index,
        Role.SHAPE: torch.tensor([out_features, in_features]),
        **(inputs or {}),
    }
    shape = LayerShape(out_features=out_features, in_features=in_features)
    stored = get_format(scheme.dialect).tensors(scheme, shape)
    return {
        tensor.name: tensor.encode(canonical[tensor.role]).contiguous()
        for tensor in stored
        if tensor.role in canonical or not tensor.optional
    }


def exchange_layers(
    layers: Mapping[str, QuantizedWeight],
    scheme: SchemeSpec,
    inputs: Mapping[str, Mapping[Role, Tensor]] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """`<layer>.weight` to the layer's encoded tensors, for every layer.

    Args:
        layers: layer to its codes.
        scheme: how they are stored.
        inputs: layer to INPUT_SCALE and INPUT_ZERO of its static activations.
    """
    stored = {
        layer: encode_layer(weight, scheme, (inputs or {}).get(layer))
        for layer, weight in layers.items()
    }
    return {
        f"{layer}.weight": {f"{layer}.{name}": tensor for name, tensor in tensors.items()}
        for layer, tensors in stored.items()
    }


def write_checkpoint(
    source: Path, out: Path, exchange: Exchange, config: Mapping[str, Any]
) -> None:
    """`out` = `source` with the tensors that `exchange` names replaced and config.json updated.

    Weight files keep their names and division; they are read one at a time. `out` appears in one
    step when it is complete.

    Args:
        source: a transformers model folder with safetensors weights.
        out: must not exist.
        exchange: what replaces which tensor.
        config: keys to set in config.json.

    Raises:
        CheckpointError: `out` exists, `source` has no safetensors, or lacks a tensor to replace.
    """
    refuse_existing(out)
    files = {path: _tensor_names(path) for path in sorted(source.glob("*.safetensors"))}
    _check_present(source, files, exchange)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _copy_other_files(source, partial)
    sizes = {path.name: _convert_file(path, partial / path.name, exchange) for path in files}
    if len(files) > 1:
        _write_json(partial / INDEX, _index(sizes))
    original = json.loads((source / "config.json").read_text())
    _write_json(partial / "config.json", {**original, **config})
    partial.rename(out)


def _tensor_names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _check_present(source: Path, files: Mapping[Path, list[str]], exchange: Exchange) -> None:
    if not files:
        raise CheckpointError(
            f"{source} has no *.safetensors file: save the model with safetensors first."
        )
    missing = sorted(set(exchange).difference(*files.values()))
    if missing:
        raise CheckpointError(
            f"{source} has no tensor {missing[0]!r} ({len(missing)} such names): its weights are "
            "named differently from the model's modules; load and save it with transformers first."
        )


def _copy_other_files(source: Path, out: Path) -> None:
    """Tokenizer, generation config, chat template, licence: all but weights."""
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHT_FILES):
            shutil.copyfile(path, out / path.name)


def _convert_file(source: Path, out: Path, exchange: Exchange) -> dict[str, int]:
    """Writes one weight file; returns the bytes of each tensor in it."""
    tensors: dict[str, Tensor] = {}
    with safe_open(source, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensors |= exchange[name] if name in exchange else {name: file.get_tensor(name)}
    save_file(tensors, out, metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _index(sizes: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """The index that tells which file holds which tensor."""
    return {
        "metadata": {"total_size": sum(sum(file.values()) for file in sizes.values())},
        "weight_map": {name: file for file, names in sizes.items() for name in names},
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
