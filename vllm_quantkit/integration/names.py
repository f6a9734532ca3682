"""Which checkpoint layer a model's layer is, and what the checkpoint's headers say about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from vllm.logger import init_logger

from vllm_quantkit.checkpoint import CheckpointAudit, TensorHeader, audit, read_headers
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.spec import LayerRules, SchemeSpec

logger = init_logger("vllm.quantkit")

LAYER_INDEX = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
NAMES_SHOWN = 8


class LayerNames:
    """Checkpoint layers, looked up by the names that vLLM's model gives them.

    Rules and headers speak of checkpoint layers. A model may rename them
    (`hf_to_vllm_mapper`), so names found in the headers are mapped forward once and looked up
    backward. Without headers to read (weights not in safetensors, or random) the rules alone speak.

    Attributes:
        folder: the checkpoint's, where it is known.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._headers: Mapping[str, TensorHeader] = {}
        self._audit: CheckpointAudit | None = None
        self._mapper: Any = None
        self._by_model_name: dict[str, str] = {}
        self._claimed: set[str] = set()

    def read(self, model: str, revision: str | None) -> None:
        """Read the headers of the checkpoint in folder, or cached hub model, `model`.

        Raises:
            CheckpointError: a file is truncated, or tensors occur twice.
        """
        self.folder = folder = checkpoint_folder(model, revision)
        if folder is None or not any(folder.glob("*.safetensors")):
            logger.info("%s has no safetensors here; tensors are checked while they load.", model)
            return
        self._headers = read_headers(folder)
        self._index()

    def audit(self, rules: LayerRules) -> None:
        """Match the headers of a quantised checkpoint with what its rules expect.

        Raises:
            CheckpointError: a tensor is missing, unexpected, misshaped or mistyped.
        """
        if self._headers:
            self._audit = audit(self._headers, rules)

    def rename(self, mapper: Any) -> None:
        """Learn the model's names for the checkpoint's layers."""
        self._mapper = mapper
        self._index()

    def _index(self) -> None:
        names = dict.fromkeys(tensor.rpartition(".")[0] for tensor in self._headers)
        self._by_model_name = {name: name for name in names}
        for name in names if self._mapper is not None else ():
            renamed = self._mapper.apply_list([name])
            if renamed:
                self._by_model_name[renamed[0]] = name

    def scheme_for(self, name: str, rules: LayerRules) -> SchemeSpec | None:
        """The scheme of the model's layer `name`; the checkpoint's tensors outrank its rules."""
        stored = self.checkpoint_name(name)
        if stored is None or self._audit is None:
            return rules.scheme_for(stored or name)
        layer = self._audit.quantised.get(stored)
        if layer is None:
            return None
        self._claimed.add(stored)
        return layer.spec

    def checkpoint_name(self, name: str) -> str | None:
        """The checkpoint's name of the model's layer; None where the headers do not have it.

        Checkpoints of a bare backbone lack the model's first component (GPT-2's `transformer.`).
        """
        return self._by_model_name.get(name) or self._by_model_name.get(name.partition(".")[2])

    def model_name(self, module: str) -> str:
        """The model's name of a module of the checkpoint that holds no tensor itself."""
        if self._mapper is None:
            return module
        probe = ".weight"  # patterns of a mapper may end in a dot
        renamed: list[str] = self._mapper.apply_list([module + probe])
        return renamed[0].removesuffix(probe) if renamed else module

    def head_tensor(self, name: str, leaf: str) -> Tensor | None:
        """The stored [heads, dimensions] tensor `leaf` of the model's module `name`, if any."""
        header = self._headers.get(f"{self.checkpoint_name(name)}.{leaf}")
        if header is None or len(header.shape) != 2:
            return None
        return self._read(f"{self.checkpoint_name(name)}.{leaf}")

    def head_tensors(self, leaves: tuple[str, ...]) -> list[str]:
        """Names of all stored [heads, dimensions] tensors that are called one of `leaves`."""
        return [
            name
            for name, header in self._headers.items()
            if name.rpartition(".")[2] in leaves and len(header.shape) == 2
        ]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The stored tensors of the model's layer `name`, by their names behind the layer's.

        Raises:
            CheckpointError: no headers could be read, or they lack the layer.
        """
        prefix = f"{self.checkpoint_name(name)}."
        found = {key.removeprefix(prefix): key for key in self._headers if key.startswith(prefix)}
        if not found:
            raise CheckpointError(
                f"the tensors of {name} must be read together, but no *.safetensors file here has "
                f"them; save the model with safetensors."
            )
        return {short: self._read(key) for short, key in found.items()}

    def _read(self, key: str) -> Tensor:
        with safe_open(self._headers[key].file, "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def check_no_bias(self, name: str) -> None:
        """The checkpoint has no bias for a layer whose model has none, or one that is zero.

        vLLM ignores such a bias, which some producers write as zeros.

        Raises:
            CheckpointError: the bias is not zero, so ignoring it would change the model.
        """
        bias = f"{self.checkpoint_name(name)}.bias"
        header = self._headers.get(bias)
        if header is None:
            return
        if self._read(bias).any():
            raise CheckpointError(
                f"{bias} in {header.file} is not zero, but the model's layer {name} has no "
                f"bias. Set the bias option in config.json (attention_bias, mlp_bias), or "
                f"save the model without it."
            )

    def ignored(self, patterns: tuple[str, ...]) -> list[str]:
        """Checkpoint layers that the patterns name and no layer of the model took."""
        layers = dict.fromkeys(tensor.rpartition(".")[0] for tensor in self._headers)
        return [
            name for name in layers if name not in self._claimed and _any_matches(patterns, name)
        ]

    def check_all_claimed(self, num_layers: int | None, ignored: tuple[str, ...]) -> None:
        """Every quantised checkpoint layer belongs to a layer of the model.

        Layers behind the model's last one (multi-token prediction heads) are not part of it.

        Args:
            num_layers: decoder layers of the model.
            ignored: regular expressions of names that need no owner.

        Raises:
            CheckpointError: names the layers nobody claimed.
        """
        orphans = [
            name
            for name in (self._audit.quantised if self._audit is not None else ())
            if name not in self._claimed
            and not behind_last_layer(name, num_layers)
            and not _any_matches(ignored, name)
        ]
        if orphans:
            raise CheckpointError(
                f"no layer of the model takes {shorten(orphans)} from the checkpoint. If that is "
                f'meant, start with --additional-config \'{{"quantkit": {{"ignore_layers": '
                f'["REGEX"]}}}}\'; if not, config.json describes another model.'
            )


def checkpoint_folder(model: str, revision: str | None) -> Path | None:
    """The folder of a model given by path, or by hub name if it is downloaded already."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def shorten(names: list[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:NAMES_SHOWN])
    rest = len(names) - NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def _any_matches(patterns: tuple[str, ...], name: str) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


def behind_last_layer(name: str, num_layers: int | None) -> bool:
    """True for the decoder layers of multi-token prediction heads."""
    found = LAYER_INDEX.search(f".{name}.")
    return found is not None and num_layers is not None and int(found[1]) >= num_layers
