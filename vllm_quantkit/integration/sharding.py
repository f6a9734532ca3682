"""How vLLM cuts layers: which rows of which merged layer a checkpoint tensor is."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

ShardId = str | int | tuple[int, ...] | None
"""Which part of a merged layer a tensor is: `q`, an index, several of them, or all (None)."""

QKV = ("q", "k", "v")


@dataclass(frozen=True)
class RankShare:
    """The part of a layer that one tensor-parallel rank holds.

    Attributes:
        prefix: the layer's name in the model.
        partitions: names of the checkpoint layers merged into this one, in order.
        partition_rows: rows of this rank in each partition.
        in_start: first input channel of this rank.
        in_features: input channels of this rank.
        full_in_features: input channels of the whole layer.
    """

    prefix: str
    partitions: tuple[str, ...]
    partition_rows: tuple[int, ...]
    in_start: int
    in_features: int
    full_in_features: int

    @property
    def out_features(self) -> int:
        """Rows of this rank, over all partitions."""
        return sum(self.partition_rows)

    @property
    def row_ranges(self) -> list[slice]:
        """This rank's rows of each partition."""
        ends = list(accumulate(self.partition_rows))
        return [slice(end - n, end) for end, n in zip(ends, self.partition_rows, strict=True)]

    def inputs(self, tensor: Tensor) -> Tensor:
        """This rank's slice of the last dimension."""
        return tensor[..., self.in_start : self.in_start + self.in_features]


def expected_outputs(layer: Any, shard: ShardId) -> int:
    """Rows of the checkpoint tensor for a shard of a layer, over all ranks."""
    if isinstance(layer, ParallelLMHead):
        return int(layer.org_vocab_size)
    if hasattr(layer, "total_num_kv_heads"):
        key_size, value_size = layer.head_size, getattr(layer, "v_head_size", layer.head_size)
        sizes = {
            "q": layer.total_num_heads * key_size,
            "k": layer.total_num_kv_heads * key_size,
            "v": layer.total_num_kv_heads * value_size,
        }
        return int(sum(sizes.values()) if shard is None else sizes[str(shard)])
    if isinstance(shard, tuple):
        return int(sum(layer.output_sizes[i] for i in shard))
    return int(layer.output_size if shard is None else layer.output_sizes[shard])


def load_rows(layer: Any, param: Parameter, rows: Tensor, shard: ShardId) -> None:
    """Copy this rank's rows of a whole shard, as vLLM's own layer classes cut them.

    Input channels are cut before, so a row-parallel layer takes every row as it is.
    """
    load = getattr(layer, "weight_loader_v2", layer.weight_loader)
    if shard is None:
        load(param, rows)
    else:
        load(param, rows, shard)
