"""Tensors of the format `pack-quantized`: several codes in a word.

The equations are in `compressed_tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from quantkit_kernels.packing import (
    WORD_BITS,
    aligned_words,
    pack_aligned,
    stream_words,
    unpack_aligned,
    unpack_stream,
)
from vllm_quantkit.formats._compressed_tensors_weights import served_bits
from vllm_quantkit.formats._layout import SCALE_DTYPES, check_below, decode_index, unpack_rows
from vllm_quantkit.formats.base import CheckpointTensor, Role
from vllm_quantkit.spec import PER_CHANNEL, LayerShape, WeightSpec

CODES = "weight_packed"


def tensors(weight: WeightSpec, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
    """weight_packed, weight_scale, weight_shape, and where the spec has them zeros and order.

    Raises:
        UnsupportedScheme: the spec is one that the format cannot store.
    """
    N, K = shape.out_features, shape.in_features
    bits, G = served_bits(weight.bits), weight.num_groups(K)
    found = [
        CheckpointTensor(
            CODES,
            Role.CODES,
            (N, aligned_words(K, bits)),
            (torch.int32,),
            partial(decode_codes, bits=bits, length=K),
            partial(encode_codes, bits=bits),
            other_shapes=((N, stream_words(K, bits)),),
        ),
        CheckpointTensor(
            "weight_scale", Role.SCALES, (N, G), SCALE_DTYPES, decode_scales, encode_scales
        ),
        CheckpointTensor(
            "weight_shape", Role.SHAPE, (2,), (torch.int64, torch.int32), size_of, size_of
        ),
    ]
    if not weight.symmetric:
        found.append(
            CheckpointTensor(
                "weight_zero_point",
                Role.ZEROS,
                (aligned_words(N, bits), G),
                (torch.int32,),
                partial(decode_zeros, bits=bits, length=N),
                partial(encode_zeros, bits=bits),
                other_shapes=((stream_words(N, bits), G),),
            )
        )
    return (*found, *order_tensors(weight, K))


def order_tensors(weight: WeightSpec, in_features: int) -> tuple[CheckpointTensor, ...]:
    """weight_g_idx where the groups are in any order."""
    if not weight.act_order:
        return ()
    decode = partial(decode_order, group_size=weight.group_size)
    dtypes = (torch.int32, torch.int64)
    return (
        CheckpointTensor(
            "weight_g_idx", Role.GROUP_INDEX, (in_features,), dtypes, decode, decode_index
        ),
    )


def infer_shape(
    weight: WeightSpec, shapes: Mapping[str, tuple[int, ...]], stored: tuple[int, int] | None
) -> LayerShape:
    """N and K: what `weight_shape` holds, else the most that packed words and groups can."""
    if stored is not None:
        return LayerShape(out_features=stored[0], in_features=stored[1])
    N, words = shapes[CODES]
    K = words * (WORD_BITS // weight.bits)
    if weight.group_size != PER_CHANNEL and len(shapes.get("weight_scale", ())) == 2:
        K = min(K, shapes["weight_scale"][1] * weight.group_size)
    return LayerShape(out_features=N, in_features=K)


def decode_codes(words: Tensor, bits: int, length: int) -> Tensor:
    """int32 [N, W] to uint8 [N, length]."""
    unpack = unpack_stream if _is_dense(words, bits, length) else unpack_aligned
    return unpack_rows(unpack, words, bits, length)


def encode_codes(codes: Tensor, bits: int) -> Tensor:
    """Inverse of `decode_codes`."""
    check_below(codes, 2**bits, "compressed-tensors codes")
    return pack_aligned(codes, bits)


def decode_zeros(words: Tensor, bits: int, length: int) -> Tensor:
    """int32 [W, G] to uint8 [length, G]."""
    unpack = unpack_stream if _is_dense(words.t(), bits, length) else unpack_aligned
    return unpack(words.t(), bits, length).t().contiguous()


def encode_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Inverse of `decode_zeros`."""
    check_below(zeros, 2**bits, "compressed-tensors zero-points")
    return pack_aligned(zeros.t(), bits).t().contiguous()


def _is_dense(words: Tensor, bits: int, length: int) -> bool:
    """True where codes follow each other without gaps, as the library packs since 0.19.

    The number of words tells the layouts apart, and where it is the same, the bits that the older
    layout leaves at 0.
    """
    dense, aligned = stream_words(length, bits), aligned_words(length, bits)
    if WORD_BITS % bits == 0 or dense != aligned:
        return words.shape[-1] == dense != aligned
    used = WORD_BITS // bits * bits
    return bool((((words.to(torch.int64) & 0xFFFFFFFF) >> used) != 0).any())


def decode_scales(stored: Tensor) -> Tensor:
    """A copy in float32."""
    return stored.to(torch.float32, copy=True)


def encode_scales(scales: Tensor) -> Tensor:
    """A copy in the dtype they have."""
    return scales.clone(memory_format=torch.contiguous_format)


def size_of(stored: Tensor) -> Tensor:
    """A copy of (N, K) in int64."""
    return stored.to(torch.int64, copy=True)


def decode_order(stored: Tensor, group_size: int) -> Tensor:
    """The stored group index; -1 anywhere means that it was never set and groups are in order."""
    index = stored.to(torch.int32, copy=True)
    if bool((index < 0).any()):
        index = torch.arange(index.shape[0], dtype=torch.int32, device=index.device)
        index = index.div(group_size, rounding_mode="floor").to(torch.int32)
    return index
