"""From checkpoint tensors to one rank's canonical tensors: shapes checked, shards counted."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter

from quantkit_kernels.packing import pack_stream, stream_words, unpack_stream
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.formats import CheckpointTensor, Role
from vllm_quantkit.integration.sharding import (
    QKV,
    RankShare,
    ShardId,
    expected_outputs,
    load_rows,
)
from vllm_quantkit.schemes import LinearScheme
from vllm_quantkit.spec import PER_CHANNEL, LayerShape


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
    channels, never of packed words, and stored canonically: any shard boundary is served.
    """

    def __init__(self, layer: Any, scheme: LinearScheme, share: RankShare) -> None:
        self._layer = weakref.ref(layer)
        self._scheme = scheme
        self._share = share
        self.ledger = Ledger()
        for tensor in self._tensors(None):
            layer.register_parameter(tensor.name, self._parameter(tensor))

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names, as in the checkpoint."""
        return tuple(tensor.name for tensor in self._tensors(None))

    def parts(self, layer: Any) -> list[dict[Role, Tensor]]:
        """Canonical tensors by role, for each run of rows that shares one group index."""
        spec = self._scheme.spec.weight
        params = {
            tensor.role: getattr(layer, tensor.name).data
            for tensor in self._tensors(None)
            # A reload leaves what it does not fill uninitialised.
            if not tensor.optional or self.ledger.shards(tensor.name)
        }
        index = params.get(Role.GROUP_INDEX, self._natural_index(params[Role.CODES].device))
        zeros = params.get(Role.ZEROS)
        if zeros is None:
            zeros = torch.full_like(params[Role.SCALES], 2 ** (spec.bits - 1), dtype=torch.int32)
        codes = unpack_stream(params[Role.CODES], spec.bits, self._share.in_features)
        whole = {Role.CODES: codes, Role.SCALES: params[Role.SCALES], Role.ZEROS: zeros}
        if all(torch.equal(row, index[0]) for row in index[1:]):
            return [{**whole, Role.GROUP_INDEX: index[0]}]
        return [
            {**{role: tensor[rows] for role, tensor in whole.items()}, Role.GROUP_INDEX: channels}
            for rows, channels in zip(self._share.row_ranges, index, strict=True)
        ]

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
        layer = self._owner()
        rows = expected_outputs(layer, shard)
        shape = LayerShape(out_features=rows, in_features=self._share.full_in_features)
        return self._scheme.tensors(shape)

    def _parameter(self, tensor: CheckpointTensor) -> Any:
        """An unfilled parameter in canonical form; optional ones hold their default."""
        share, spec = self._share, self._scheme.spec.weight
        load = self._loader(tensor.name)
        groups = spec.num_groups(share.full_in_features)
        if tensor.role is Role.CODES:
            words = stream_words(share.in_features, spec.bits)
            data = torch.zeros(share.out_features, words, dtype=torch.int32)
        elif tensor.role is Role.SCALES:
            data = torch.full((share.out_features, groups), torch.nan, dtype=torch.float32)
        elif tensor.role is Role.ZEROS:
            middle = 2 ** (spec.bits - 1)
            data = torch.full((share.out_features, groups), middle, dtype=torch.int32)
        elif tensor.role is Role.GROUP_INDEX:
            index = self._natural_index(torch.get_default_device())
            return BasevLLMParameter(data=index, weight_loader=load)
        else:
            data = torch.zeros(len(share.partitions), *tensor.shape, dtype=torch.int64)
            return BasevLLMParameter(data=data, weight_loader=load)
        return ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=load)

    def _natural_index(self, device: torch.device) -> Tensor:
        """k // group_size of this rank's channels, int32 [partitions, K]."""
        share, group_size = self._share, self._scheme.spec.weight.group_size
        channels = torch.arange(share.in_start, share.in_start + share.in_features, device=device)
        size = share.full_in_features if group_size == PER_CHANNEL else group_size
        return (channels // size).to(torch.int32).repeat(len(share.partitions), 1)

    def _loader(self, name: str) -> Callable[..., None]:
        """vLLM's weight-loader protocol for the tensor called `name`."""

        def weight_loader(param: Parameter, loaded: Tensor, shard: ShardId = None) -> None:
            self._load(param, name, loaded, shard)

        return weight_loader

    def _load(self, param: Parameter, name: str, loaded: Tensor, shard: ShardId) -> None:
        tensor = next(t for t in self._tensors(shard) if t.name == name)
        label = f"{self._label(shard)}.{name}"
        check_tensor(label, loaded, tensor)
        by_partition = tensor.role in (Role.GROUP_INDEX, Role.SHAPE)
        if param.is_meta:
            # A reload first counts what the loader would copy; decoding copies too.
            rows = () if by_partition else (expected_outputs(self._owner(), shard),)
            canonical = param.data.new_empty(*rows, *param.shape[1:])
        else:
            self._record(name, shard, label)
            canonical = self._canonical(param.device, tensor, loaded, shard, label)
        if by_partition:
            for slot in self._slots(shard):
                param.data[slot].copy_(canonical)
        else:
            load_rows(self._owner(), param, canonical.to(param.dtype), shard)

    def _canonical(
        self,
        device: torch.device,
        tensor: CheckpointTensor,
        loaded: Tensor,
        shard: ShardId,
        label: str,
    ) -> Tensor:
        """The tensor decoded and cut to this rank's input channels, every row of it."""
        try:
            canonical = tensor.decode(loaded.to(device))
        except ValueError as error:
            raise CheckpointError(f"{label} cannot be decoded: {error}") from error
        if tensor.role is Role.SHAPE:
            self._check_shape(label, canonical, shard)
        elif tensor.role is Role.GROUP_INDEX:
            return self._share.inputs(canonical)
        elif tensor.role is Role.CODES:
            return pack_stream(self._share.inputs(canonical), self._scheme.spec.weight.bits)
        return canonical

    def _record(self, name: str, shard: ShardId, label: str) -> None:
        self.ledger.received[name, shard] += 1
        if self.ledger.received[name, shard] > 1:
            raise CheckpointError(
                f"{label} occurs twice in the checkpoint; remove the shard file that repeats it."
            )

    def _check_shape(self, label: str, stored: Tensor, shard: ShardId) -> None:
        layer = self._owner()
        expected = [expected_outputs(layer, shard), self._share.full_in_features]
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
    if shape != expected.shape:
        raise CheckpointError(
            f"{label} has shape {list(shape)}, expected {list(expected.shape)}; the checkpoint's "
            f"quantization_config (bits, group_size) or its model sizes do not fit its tensors."
        )
    if found.dtype not in expected.dtypes:
        allowed = " or ".join(str(dtype) for dtype in expected.dtypes)
        raise CheckpointError(f"{label} has dtype {found.dtype}, expected {allowed}.")
