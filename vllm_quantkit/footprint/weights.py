"""Bytes of a model's weights and buffers on one rank, as they lie in memory once loaded."""

from __future__ import annotations

from math import prod

from vllm_quantkit.errors import about
from vllm_quantkit.footprint.facts import LayerGroup, Model
from vllm_quantkit.footprint.groups import padded_vocabulary
from vllm_quantkit.footprint.kv_cache import ITEM_BYTES
from vllm_quantkit.footprint.layers import Layer, is_embedding, other_tensors
from vllm_quantkit.footprint.packed import packed_bytes
from vllm_quantkit.hardware.device import Device
from vllm_quantkit.spec import Frozen, LayerShape, SchemeSpec

PACKED_COPIES = {"cuda": 0, "cpu": 1, "apple": 0}
"""Copies of 16-bit embeddings and heads that vLLM packs for its matrix product beside the original.

On x86 it hands every such weight to oneDNN, and frees the original of linear layers only:
https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/layers/utils.py
"""

WITHOUT_HEAD = ("gemma2", "gemma3n", "cohere")
"""Families whose classes in vLLM multiply by the embedding itself; others with tied weights have a
head that shares them, and packs its own copy."""

POSITIONS = ("wpe", "pos")
"""Parts of the names of tables of vectors by position."""

SCALE_BYTES = 2
"""Of a group's scale in vLLM's own layouts, which keep the activations' dtype."""


class WeightBytes(Frozen):
    """Bytes on one rank.

    Attributes:
        linear: the linear layers of the blocks, biases included.
        head: the output head; 0 where it is the embedding.
        embedding: embeddings.
        copies: what vLLM packs besides, see `PACKED_COPIES`.
        other: norms, and tables of positions.
    """

    linear: int
    head: int
    embedding: int
    copies: int
    other: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.head + self.embedding + self.copies + self.other


def weight_bytes(
    model: Model,
    groups: tuple[LayerGroup, ...],
    layers: list[Layer],
    device: Device,
    *,
    tp: int,
    dtype: str,
    in_tree: bool,
) -> WeightBytes:
    """Bytes of everything that is loaded.

    Args:
        model: any.
        groups: of `layer_groups`.
        layers: that they were made of.
        device: whose kernels run them.
        tp: tensor-parallel size.
        dtype: of the activations.
        in_tree: True where vLLM itself serves quantised layers.

    Raises:
        UnsupportedScheme: no kernel multiplies a rank's share of a layer.
    """
    item = ITEM_BYTES[dtype]
    embedding, positions, other = 0, 0, _rope_bytes(model, item)
    for name, header in other_tensors(model, layers):
        size = prod(header.shape) * (item if header.dtype.is_floating_point else 8)
        if not is_embedding(name, header):
            other += size
        elif header.shape[0] == model.facts.vocab_size and not _is_by_position(name):
            embedding += padded_vocabulary(header.shape[0]) // tp * header.shape[1] * item
        else:
            positions += size
    sizes = {True: 0, False: 0}
    shares = model.facts.tied_embeddings and not model.facts.model_type.startswith(WITHOUT_HEAD)
    copies = embedding * (2 if shares else 1)
    for group in groups:
        size = group.count * group_bytes(group, device, dtype, tp, in_tree=in_tree)
        sizes[group.head] += size
        copies += size if group.head and group.spec is None else 0
    return WeightBytes(
        linear=sizes[False],
        head=sizes[True],
        embedding=embedding + positions,
        copies=PACKED_COPIES[device.kind] * copies,
        other=other,
    )


def group_bytes(
    group: LayerGroup, device: Device, dtype: str, tp: int, *, in_tree: bool = False
) -> int:
    """Bytes of one layer of a group on one rank, its bias included.

    Raises:
        UnsupportedScheme: no kernel multiplies the rank's share.
    """
    rows, item = group.rank_shape.out_features, ITEM_BYTES[dtype]
    bias = rows * item if group.bias else 0
    if group.spec is None:
        return rows * group.rank_shape.in_features * item + bias
    if in_tree:
        return in_tree_bytes(group.spec, group.rank_shape) + bias
    with about(group.name):
        return bias + packed_bytes(
            group.spec,
            group.rank_shape,
            device,
            dtype,
            rows=group.rank_rows,
            tp_inputs=tp if group.parallel == "row" else 1,
        )


def in_tree_bytes(spec: SchemeSpec, shape: LayerShape) -> int:
    """Codes, scales and zero-points as a checkpoint has them: what vLLM's own layers keep.

    An estimate: some of its kernels pad, and keep scales in 32 bits.
    """
    rows, columns, weight = shape.out_features, shape.in_features, spec.weight
    groups = rows * weight.num_groups(columns)
    if weight.scale_rows > 1:
        groups = -(-groups // weight.scale_rows)
    zeros = 0 if weight.symmetric else groups * weight.bits // 8
    return rows * columns * weight.bits // 8 + SCALE_BYTES * groups + zeros


def _is_by_position(name: str) -> bool:
    return any(part in name.split(".")[-2] for part in POSITIONS)


def _rope_bytes(model: Model, item: int) -> int:
    """Sines and cosines of every position, once for each kind of layer that rotates its own way."""
    facts, config = model.facts, model.config
    rotates = any(name in config for name in ("rope_theta", "rope_parameters", "rope_scaling"))
    if not rotates:
        return 0
    size = (facts.latent_dim and config.get("qk_rope_head_dim")) or facts.head_dim
    partial = config.get("partial_rotary_factor") or 1.0
    kinds = 2 if "rope_local_base_freq" in config or _by_kind(config.get("rope_parameters")) else 1
    return kinds * facts.max_position * int(size * partial) * item


def _by_kind(parameters: object) -> bool:
    """True where parameters are told for each kind of layer."""
    return isinstance(parameters, dict) and any(
        isinstance(value, dict) for value in parameters.values()
    )
