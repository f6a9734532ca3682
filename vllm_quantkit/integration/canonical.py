"""One rank's canonical tensors of a layer: parameters that vLLM's loaders fill."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter

from quantkit_kernels.packing import pack_stream, stream_words, unpack_stream
from vllm_quantkit.formats import Role
from vllm_quantkit.formats._layout import BLOCK_ROWS, unpack_rows
from vllm_quantkit.integration.sharding import RankShare, ShardId, load_rows
from vllm_quantkit.spec import PER_CHANNEL, WeightSpec

BY_PARTITION = {
    Role.GROUP_INDEX: torch.int32,
    Role.SHAPE: torch.int64,
    Role.INPUT_SCALE: torch.float32,
    Role.INPUT_ZERO: torch.float32,
    Role.MARK: torch.float32,
}
"""Roles of which every partition of a merged layer has its own tensor, to their dtype."""

MADE_AT_LOAD = {
    Role.CODES: "weight",
    Role.SCALES: "weight_scale",
    Role.ZEROS: "weight_zero_point",
}
"""Parameters of what is made from a 16-bit weight on arrival."""

INT8_MIN, INT8_LEVELS = -128, 255

WeightLoader = Callable[..., None]
"""vLLM's protocol: (parameter, loaded tensor, shard)."""


class CanonicalParameters:
    """Holds codes in their own number of bits, float32 scales, and what else a dialect stores.

    Attributes:
        names: role to the name of its parameter.
    """

    def __init__(
        self, spec: WeightSpec, share: RankShare, names: Mapping[Role, str], shape: tuple[int, ...]
    ) -> None:
        """`shape` is that of a `Role.MARK` tensor."""
        self.names = dict(names)
        self._spec, self._share, self._mark_shape = spec, share, shape

    def register(self, layer: Any, loader: Callable[[str], WeightLoader]) -> None:
        """Give `layer` an unfilled parameter for every role; optional ones hold their default."""
        for role, name in self.names.items():
            layer.register_parameter(name, self._parameter(role, loader(name)))

    def store(
        self,
        layer: Any,
        param: Parameter,
        role: Role,
        value: Tensor,
        shard: ShardId,
        slots: list[int],
    ) -> None:
        """Put a shard's canonical tensor, all rows and this rank's channels, where it belongs."""
        if role in BY_PARTITION:
            for slot in slots:
                param.data[slot].copy_(value)
        else:
            load_rows(layer, param, value.to(param.dtype), shard)

    def placeholder(self, param: Parameter, role: Role, rows: int) -> Tensor:
        """A tensor of the size that `store` takes, on the device of `param`."""
        leading = () if role in BY_PARTITION else (rows,)
        return param.data.new_empty(*leading, *param.shape[1:])

    def cut(self, role: Role, value: Tensor) -> Tensor:
        """This rank's input channels of a canonical tensor, as it is kept."""
        if role is Role.GROUP_INDEX:
            return self._share.inputs(value)
        if role is Role.CODES:
            return self._packed(self._share.inputs(value))
        return value

    def _packed(self, codes: Tensor) -> Tensor:
        """uint8 [N, K] to the words that are kept, a few rows at a time: they take less memory."""
        words = stream_words(codes.shape[1], self._spec.bits)
        packed = torch.empty(len(codes), words, dtype=torch.int32, device=codes.device)
        for start in range(0, len(codes), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            packed[rows] = pack_stream(codes[rows], self._spec.bits)
        return packed

    def _unpacked(self, words: Tensor) -> Tensor:
        """The inverse of `_packed`; of 8 bits a view, since a word's bytes are its codes."""
        bits, size = self._spec.bits, self._share.in_features
        if bits == 8:
            return words.view(torch.uint8)[:, :size]
        return unpack_rows(unpack_stream, words, bits, size)

    def parts(self, layer: Any, filled: Collection[Role]) -> list[dict[Role, Tensor]]:
        """Canonical tensors by role, for each run of rows that shares one group index.

        Args:
            layer: the layer.
            filled: roles that have been loaded; others hold nothing (a reload leaves them
                uninitialised) and take their default.
        """
        params = {
            role: getattr(layer, name).data for role, name in self.names.items() if role in filled
        }
        scales = params[Role.SCALES]
        codes = self._unpacked(params[Role.CODES])
        index = params.get(Role.GROUP_INDEX, self._natural_index(scales.device))
        zeros = params.get(Role.ZEROS, self._default_zeros(scales))
        whole = {Role.CODES: codes, Role.SCALES: scales, Role.ZEROS: zeros}
        shared = _static_input(params)
        if all(torch.equal(row, index[0]) for row in index[1:]):
            return [{**whole, Role.GROUP_INDEX: index[0], **shared}]
        return [
            {
                **{role: tensor[rows] for role, tensor in whole.items()},
                Role.GROUP_INDEX: channels,
                **shared,
            }
            for rows, channels in zip(self._share.row_ranges, index, strict=True)
        ]

    def _parameter(self, role: Role, load: WeightLoader) -> Any:
        share, groups = self._share, self._spec.num_groups(self._share.full_in_features)
        if role in BY_PARTITION:
            return BasevLLMParameter(data=self._by_partition(role), weight_loader=load)
        if role is Role.CODES:
            words = stream_words(share.in_features, self._spec.bits)
            data = torch.zeros(share.out_features, words, dtype=torch.int32)
        else:
            data = torch.full((share.out_features, groups), torch.nan, dtype=torch.float32)
            data = self._default_zeros(data) if role is Role.ZEROS else data
        return ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=load)

    def _by_partition(self, role: Role) -> Tensor:
        count = len(self._share.partitions)
        if role is Role.GROUP_INDEX:
            return self._natural_index(torch.get_default_device())
        sizes = {Role.SHAPE: (2,), Role.MARK: self._mark_shape}
        return torch.zeros(count, *sizes.get(role, (1,)), dtype=BY_PARTITION[role])

    def _default_zeros(self, scales: Tensor) -> Tensor:
        return torch.full_like(scales, self._spec.default_zero, dtype=torch.int32)

    def _natural_index(self, device: torch.device) -> Tensor:
        """k // group_size of this rank's channels, int32 [partitions, K]."""
        share, group_size = self._share, self._spec.group_size
        channels = torch.arange(share.in_start, share.in_start + share.in_features, device=device)
        size = share.full_in_features if group_size == PER_CHANNEL else group_size
        return (channels // size).to(torch.int32).repeat(len(share.partitions), 1)


def _static_input(params: Mapping[Role, Tensor]) -> dict[Role, Tensor]:
    """One static scale, and zero-point, for the input that all partitions read.

    Where the partitions of a merged layer were calibrated apart, theirs cover all their ranges.
    """
    if Role.INPUT_SCALE not in params:
        return {}
    scales = params[Role.INPUT_SCALE]
    if Role.INPUT_ZERO not in params:
        return {Role.INPUT_SCALE: scales.max().reshape(1)}
    zeros = params[Role.INPUT_ZERO]
    if bool((scales == scales[0]).all()) and bool((zeros == zeros[0]).all()):
        return {Role.INPUT_SCALE: scales[0], Role.INPUT_ZERO: zeros[0]}
    low = ((INT8_MIN - zeros) * scales).min()
    high = ((INT8_MIN + INT8_LEVELS - zeros) * scales).max()
    scale = ((high - low) / INT8_LEVELS).reshape(1)
    return {Role.INPUT_SCALE: scale, Role.INPUT_ZERO: torch.round(INT8_MIN - low / scale)}
