"""What a calibration, or the checkpoint itself, says about each layer's keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from quantkit_kernels.kv_int4 import KeyTreatment, check_treatment_values
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.integration.names import LayerNames, behind_last_layer
from vllm_quantkit.kv_calibration import FOLDER, KVLayer, read_kv_calibration

SHIFT_TENSOR, SCALE_TENSOR = "k_zero_point", "k_scale"
"""Of an attention module in a checkpoint: float [kv_heads, head_size]."""

HEAD_TENSORS = (SHIFT_TENSOR, SCALE_TENSOR)


@dataclass(frozen=True)
class ServedHeads:
    """An attention layer's KV heads on this rank.

    Attributes:
        count: of them.
        head_size: dimensions of a key.
    """

    count: int
    head_size: int


class KVStatistics:
    """A model's calibration: the user's, the model folder's own, or tensors of the checkpoint.

    Attributes:
        source: where it is from, for the log; None where there is none.
    """

    def __init__(self, names: LayerNames, calibration: Path | None) -> None:
        """Reads the calibration in the folder, or the one beside the model's files.

        Raises:
            CheckpointError: it cannot be read.
        """
        self._names, self._layers = names, dict[str, KVLayer]()
        self._folder = calibration if calibration is not None else _beside(names.folder)
        self.source: str | None = None
        if self._folder is not None:
            found = read_kv_calibration(self._folder).layers
            self._layers = {names.model_name(name): layer for name, layer in found.items()}
            self.source = str(self._folder)

    def layer(self, prefix: str, num_layers: int | None) -> KVLayer | None:
        """What the calibration says about the attention layer `prefix`.

        None without a calibration, and for layers behind the model's last one.

        Raises:
            CheckpointError: the calibration is of a model without such a layer.
        """
        module = prefix.rpartition(".")[0]
        found = self._layers.get(module) or self._layers.get(module.partition(".")[2])
        if found is None and self._layers and not behind_last_layer(prefix, num_layers):
            raise CheckpointError(
                f"{self._folder} has no layer {module}, but {', '.join(list(self._layers)[:3])} "
                f"...: it was made of another model. Calibrate this one: "
                f"quantkit calibrate-kv MODEL --calibration TEXT --out FOLDER."
            )
        return found

    def treatment(self, prefix: str, found: KVLayer | None, heads: ServedHeads) -> KeyTreatment:
        """Shift and scale of this rank's KV heads, float32 [count, head_size] each, or None.

        Raises:
            CheckpointError: they are of a model with other heads, or hold what they may not.
        """
        if found is not None:
            whole = KeyTreatment(found.shift, found.scale)
        else:
            whole = self._stored(prefix.rpartition(".")[0])
        cut = KeyTreatment(*(None if t is None else _cut(prefix, t, heads) for t in whole))
        try:
            check_treatment_values(cut)
        except ValueError as error:
            raise CheckpointError(f"{prefix}: {error}.") from error
        return cut

    def _stored(self, module: str) -> KeyTreatment:
        tensors = (self._names.head_tensor(module, leaf) for leaf in HEAD_TENSORS)
        treatment = KeyTreatment(*(None if t is None else t.float() for t in tensors))
        if any(t is not None for t in treatment):
            self.source = "the checkpoint's own tensors"
        return treatment


def _beside(model: Path | None) -> Path | None:
    """The calibration inside a model's folder."""
    return model / FOLDER if model is not None and (model / FOLDER).is_dir() else None


def _cut(prefix: str, tensor: Tensor, heads: ServedHeads) -> Tensor:
    """This rank's heads: a share of them, or one that several ranks have."""
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    total = tensor.shape[0]
    shared = heads.count == 1 and ranks % total == 0
    if tensor.shape[1] != heads.head_size or not (shared or total == heads.count * ranks):
        raise CheckpointError(
            f"{prefix} has {heads.count} KV heads of {heads.head_size} dimensions on each of "
            f"{ranks} ranks, but its calibration has {total} heads of {tensor.shape[1]}; it was "
            f"made of another model. Calibrate this one, or remove the calibration."
        )
    first = rank * total // ranks
    device: Any = torch.get_default_device()
    return tensor[first : first + heads.count].to(device, torch.float32).contiguous()
