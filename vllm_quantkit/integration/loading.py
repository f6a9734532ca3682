"""From checkpoint tensors to one rank's canonical tensors: shapes checked, shards counted."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import CheckpointError, ConfigError
from vllm_quantkit.formats import CheckpointTensor, Role
from vllm_quantkit.integration.canonical import MADE_AT_LOAD, CanonicalParameters, WeightLoader
from vllm_quantkit.integration.sharding import QKV, RankShare, ShardId, expected_outputs
from vllm_quantkit.schemes import LinearScheme
from vllm_quantkit.spec import LayerShape, SchemeSpec


class Surroundings(Protocol):
    """What a layer's loader may ask about the rest of the checkpoint, and tells."""

    def companions(self, partition: str) -> Mapping[str, Tensor]:
        """The stored tensors of a checkpoint layer that only mean something together."""

    def smoothed(self, weight: Tensor, prefix: str, *, has_last: bool) -> Tensor:
        """The 16-bit weight of one or more partitions of the layer `prefix`, as it is quantised.

        `has_last` is True where the layer's last partition is among them.
        """

    def arrived(
        self, label: str, spec: SchemeSpec, weight: Tensor, quantized: QuantizedWeight
    ) -> None:
        """A 16-bit weight was quantised as `spec` says."""


@dataclass
class Ledger:
    """Which shards of which tensors a layer has received."""

    received: Counter[tuple[str, ShardId]] = field(default_factory=Counter)

    def shards(self, name: str) -> list[ShardId]:
        """The shards of tensor `name` received so far."""
        return [shard for tensor, shard in self.received if tensor == name]


class LayerLoader:
    """Creates a layer's parameters under their checkpoint names and fills them, canonical.

    Every dialect's tensor is decoded on arrival, cut to this rank's channels in units of
    channels, never of packed words, and stored canonically: any shard boundary is served. A 16-bit
    weight is quantised on arrival, whole rows at a time, so that every division of the model over
    ranks computes the same codes.
    """

    def __init__(
        self, layer: Any, scheme: LinearScheme, share: RankShare, around: Surroundings
    ) -> None:
        self._layer = weakref.ref(layer)
        self._scheme = scheme
        self._share = share
        self._around = around
        self.ledger = Ledger()
        tensors = self._tensors(None)
        marks = [tensor.shape for tensor in tensors if tensor.role is Role.MARK]
        self._params = CanonicalParameters(
            scheme.spec.weight, share, self._roles(tensors), marks[0] if marks else ()
        )
        self._params.register(layer, self._loader)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(self._params.names.values())

    @property
    def quantises(self) -> bool:
        """True where 16-bit weights arrive."""
        return self._tensors(None)[0].role is Role.WEIGHT

    def parts(self, layer: Any) -> list[dict[Role, Tensor]]:
        """Canonical tensors by role, for each run of rows that shares one group index."""
        filled = {
            tensor.role
            for tensor in self._tensors(None)
            if not tensor.optional or self.ledger.shards(tensor.name)
        }
        if self._makes_several(self._tensors(None)[0]):
            filled = set(self._params.names)
        return self._params.parts(layer, filled)

    def check_complete(self) -> None:
        """Every required tensor has arrived for every partition, and none is left half filled.

        Raises:
            CheckpointError: names the tensors that are missing.
        """
        missing = [
            f"{partition}.{tensor.name}"
            for tensor in self._tensors(None)
            for partition in self._missing_partitions(tensor)
        ]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {', '.join(missing)}, needed by {self._share.prefix}; "
                f"the file is incomplete or its quantization_config describes another model."
            )

    def _roles(self, tensors: tuple[CheckpointTensor, ...]) -> dict[Role, str]:
        if not self._makes_several(tensors[0]):
            return {tensor.role: tensor.name for tensor in tensors}
        symmetric = self._scheme.spec.weight.symmetric
        return {
            role: name
            for role, name in MADE_AT_LOAD.items()
            if not (role is Role.ZEROS and symmetric)
        }

    def _owner(self) -> Any:
        """The layer; held weakly because its parameters hold this loader."""
        layer = self._layer()
        assert layer is not None
        return layer

    def _missing_partitions(self, tensor: CheckpointTensor) -> list[str]:
        shards = self.ledger.shards(tensor.name)
        if None in shards or (tensor.optional and not shards):
            return []
        received = {slot for shard in shards for slot in self._slots(shard)}
        return [name for i, name in enumerate(self._share.partitions) if i not in received]

    def _tensors(self, shard: ShardId) -> tuple[CheckpointTensor, ...]:
        return self._scheme.tensors(self._shape(shard))

    def _shape(self, shard: ShardId) -> LayerShape:
        rows = expected_outputs(self._owner(), shard)
        return LayerShape(out_features=rows, in_features=self._share.full_in_features)

    def _loader(self, name: str) -> WeightLoader:
        """vLLM's weight-loader protocol for the tensor called `name`."""

        def weight_loader(param: Parameter, loaded: Tensor, shard: ShardId = None) -> None:
            self._load(param, name, loaded, shard)

        return weight_loader

    def _load(self, param: Parameter, name: str, loaded: Tensor, shard: ShardId) -> None:
        tensor = next(t for t in self._tensors(shard) if t.name == name)
        label = f"{self._label(shard)}.{name}"
        check_tensor(label, loaded, tensor)
        if param.is_meta:
            # A reload first counts what the loader would copy; decoding copies too.
            rows = expected_outputs(self._owner(), shard)
            made = {
                role: self._params.placeholder(self._param(role, name, param), role, rows)
                for role in self._filled_by(tensor)
            }
        else:
            self._record(name, shard, label)
            made = self._canonical(param.device, tensor, loaded, shard, label)
        for role, value in made.items():
            target = self._param(role, name, param)
            self._params.store(self._owner(), target, role, value, shard, self._slots(shard))

    def _filled_by(self, tensor: CheckpointTensor) -> tuple[Role, ...]:
        """Roles that the arrival of a tensor fills."""
        several = self._makes_several(tensor)
        return tuple(self._params.names) if several else (tensor.role,)

    def _makes_several(self, tensor: CheckpointTensor) -> bool:
        """True where one tensor's arrival makes all of the layer's canonical tensors."""
        return tensor.role is Role.WEIGHT or self._assembles()

    def _param(self, role: Role, name: str, param: Parameter) -> Any:
        """The parameter of a role; `param`, called `name`, is the one vLLM is loading."""
        own = self._params.names[role]
        return param if own == name else getattr(self._owner(), own)

    def _canonical(
        self,
        device: torch.device,
        tensor: CheckpointTensor,
        loaded: Tensor,
        shard: ShardId,
        label: str,
    ) -> dict[Role, Tensor]:
        """What the tensor means: every row of it, cut to this rank's input channels."""
        try:
            if self._assembles():
                made = self._assemble(shard, device)
            else:
                made = {tensor.role: tensor.decode(loaded.to(device))}
            if tensor.role is Role.WEIGHT:
                made = self._quantize(made[Role.WEIGHT], shard, label)
        except ConfigError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{label} cannot be decoded: {error}") from error
        if tensor.role is Role.SHAPE:
            self._check_shape(label, made[Role.SHAPE], shard)
        for role in (Role.SCALES, Role.INPUT_SCALE):
            if role in made:
                self._check_scales(label, made[role])
        return {role: self._params.cut(role, value) for role, value in made.items()}

    def _quantize(self, weight: Tensor, shard: ShardId, label: str) -> dict[Role, Tensor]:
        has_last = len(self._share.partitions) - 1 in self._slots(shard)
        weight = self._around.smoothed(weight, self._share.prefix, has_last=has_last)
        quantized = self._scheme.quantize(weight)
        self._around.arrived(label, self._scheme.spec, weight, quantized)
        made = {
            Role.CODES: quantized.codes,
            Role.SCALES: quantized.scales,
            Role.ZEROS: quantized.zeros,
        }
        return {role: made[role] for role in self._params.names}

    def _assembles(self) -> bool:
        """True where the dialect's tensors only mean something together."""
        return self._scheme.assembles

    def _assemble(self, shard: ShardId, device: torch.device) -> dict[Role, Tensor]:
        stored = self._around.companions(self._label(shard))
        on_device = {name: tensor.to(device) for name, tensor in stored.items()}
        return self._scheme.assemble(on_device, self._shape(shard))

    def _check_scales(self, label: str, scales: Tensor) -> None:
        """Scales are finite and positive, or 0 where producers store that for dead groups.

        Raises:
            CheckpointError: names the first that is not.
        """
        spec = self._scheme.spec
        bad = ~torch.isfinite(scales)
        # Double-quantised scales of dead blocks may even come out a little below 0.
        if not self._assembles():
            bad |= scales < 0
        if not (spec.is_packed or spec.dialect == "bitsandbytes"):
            bad |= scales == 0
        if bad.any():
            where = bad.nonzero()[0].tolist()
            raise CheckpointError(
                f"{label} has the scale {scales[tuple(where)].item()} at {where}, but scales must "
                f"be positive and finite. The checkpoint is damaged: download it again, or save "
                f"the model again."
            )

    def _record(self, name: str, shard: ShardId, label: str) -> None:
        self.ledger.received[name, shard] += 1
        if self.ledger.received[name, shard] > 1:
            raise CheckpointError(
                f"{label} occurs twice in the checkpoint; remove the shard file that repeats it."
            )

    def _check_shape(self, label: str, stored: Tensor, shard: ShardId) -> None:
        expected = [expected_outputs(self._owner(), shard), self._share.full_in_features]
        if stored.tolist() != expected:
            raise CheckpointError(
                f"{label} says {stored.tolist()}, but the model's layer is {expected}; config.json "
                f"describes another model."
            )

    def _slots(self, shard: ShardId) -> list[int]:
        """Indices of the partitions that a shard fills."""
        if shard is None:
            return list(range(len(self._share.partitions)))
        if isinstance(shard, tuple):
            return list(shard)
        return [QKV.index(shard) if isinstance(shard, str) else shard]

    def _label(self, shard: ShardId) -> str:
        """The checkpoint layer a shard belongs to, or the merged layer where it is one tensor."""
        names = self._share.partitions
        if isinstance(shard, str | int):
            return names[self._slots(shard)[0]]
        return self._share.prefix


def check_tensor(label: str, found: Tensor, expected: CheckpointTensor) -> None:
    """The tensor has the shape and dtype its dialect gives it.

    Raises:
        CheckpointError: names the tensor, what was found and what was expected.
    """
    shape = tuple(found.shape)
    if not expected.admits(shape):
        raise CheckpointError(
            f"{label} has shape {list(shape)}, expected {list(expected.shape)}; the checkpoint's "
            f"quantization_config (bits, group_size) or its model sizes do not fit its tensors."
        )
    expected.check_dtype(label, found.dtype)
