"""compressed-tensors checkpoints, format `pack-quantized`: W = scale * (code - zero).

Words of 32 bits hold p = floor(32 / bits) whole codes, the last word of a row padded with zeros.
The library's signed integers are stored with 2**(bits - 1) added, which makes them our codes and
zero-points:

    weight_packed[n, w]     = sum_i codes[n, p w + i] << (i bits)    int32 [N, ceil(K/p)]
    weight_scale[n, g]                                               float [N, G]
    weight_zero_point[w, g] = sum_i zeros[p w + i, g] << (i bits)    int32 [ceil(N/p), G]
    weight_shape            = (N, K)                                 int64 [2]
    weight_g_idx[k]         = the group of input k                   int32 [K]

Zero-points exist where `symmetric` is false, `weight_g_idx` where `actorder` is `group`.

Names: an entry of `ignore` or `targets` is a whole name, `re:` and a regular expression matched
from the name's start, or the class `Linear`. `ignore` wins, then whole names, then regular
expressions in the order of the config, then `Linear`, which takes in the head.

Source: https://github.com/vllm-project/compressed-tensors (`compressors/pack_quantized`,
`quantization/quant_args.py`, `utils/match.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.packing import WORD_BITS, aligned_words, pack_aligned, unpack_aligned
from vllm_quantkit.formats._compressed_tensors_config import (
    DIALECT,
    FORMAT,
    LINEAR,
    ConfigFields,
    served_bits,
)
from vllm_quantkit.formats._layout import SCALE_DTYPES, check_below, decode_index, unpack_rows
from vllm_quantkit.formats.base import CheckpointTensor, Role
from vllm_quantkit.spec import (
    PER_CHANNEL,
    LayerRules,
    LayerShape,
    SchemeSpec,
)

TENSORS = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
)


def parse(config: Mapping[str, Any]) -> LayerRules:
    """Each group's scheme for its targets, but 16 bits for what `ignore` names.

    Raises:
        ConfigError: a key is missing, has the wrong type or a value nothing can mean.
        UnsupportedScheme: the config is well formed but not served; says what to do.
    """
    return ConfigFields.read(config).rules()


def tensors(spec: SchemeSpec, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
    """weight_packed, weight_scale, weight_shape, and where the spec has them zeros and order.

    Raises:
        UnsupportedScheme: the spec is one that the dialect cannot store.
    """
    weight, N, K = spec.weight, shape.out_features, shape.in_features
    bits, G = served_bits(weight.bits), weight.num_groups(K)
    found = [
        CheckpointTensor(
            "weight_packed",
            Role.CODES,
            (N, aligned_words(K, bits)),
            (torch.int32,),
            partial(decode_codes, bits=bits, length=K),
            partial(encode_codes, bits=bits),
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
            )
        )
    if weight.act_order:
        found.append(
            CheckpointTensor(
                "weight_g_idx",
                Role.GROUP_INDEX,
                (K,),
                (torch.int32, torch.int64),
                partial(decode_order, group_size=weight.group_size),
                decode_index,
            )
        )
    return tuple(found)


def infer_shape(
    spec: SchemeSpec, shapes: Mapping[str, tuple[int, ...]], stored: tuple[int, int] | None = None
) -> LayerShape:
    """N and K: what `weight_shape` holds, else the most that packed words and groups can."""
    if stored is not None:
        return LayerShape(out_features=stored[0], in_features=stored[1])
    N, words = shapes["weight_packed"]
    K = words * (WORD_BITS // spec.weight.bits)
    if spec.weight.group_size != PER_CHANNEL and len(shapes.get("weight_scale", ())) == 2:
        K = min(K, shapes["weight_scale"][1] * spec.weight.group_size)
    return LayerShape(out_features=N, in_features=K)


def render(spec: SchemeSpec, ignore: tuple[str, ...]) -> dict[str, Any]:
    """A compressed-tensors config; `ignore` holds whole names or `re:` expressions.

    The head stays in 16 bits whether or not `ignore` names it.
    """
    grouped = spec.weight.group_size != PER_CHANNEL
    weights = {
        "num_bits": spec.weight.bits,
        "type": "int",
        "symmetric": spec.weight.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": spec.weight.group_size if grouped else None,
        "actorder": "group" if spec.weight.act_order else None,
        "dynamic": False,
    }
    group = {
        "targets": [LINEAR],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": DIALECT,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(dict.fromkeys((*ignore, "lm_head"))),
        "kv_cache_scheme": None,
    }


def decode_codes(words: Tensor, bits: int, length: int) -> Tensor:
    """int32 [N, W] to uint8 [N, length]."""
    return unpack_rows(unpack_aligned, words, bits, length)


def encode_codes(codes: Tensor, bits: int) -> Tensor:
    """Inverse of `decode_codes`."""
    check_below(codes, 2**bits, "compressed-tensors codes")
    return pack_aligned(codes, bits)


def decode_zeros(words: Tensor, bits: int, length: int) -> Tensor:
    """int32 [W, G] to uint8 [length, G]."""
    return unpack_aligned(words.t(), bits, length).t().contiguous()


def encode_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Inverse of `decode_zeros`."""
    check_below(zeros, 2**bits, "compressed-tensors zero-points")
    return pack_aligned(zeros.t(), bits).t().contiguous()


def decode_scales(stored: Tensor) -> Tensor:
    """A copy in float32."""
    return stored.to(torch.float32, copy=True)


def encode_scales(scales: Tensor) -> Tensor:
    """A copy in float16."""
    return scales.to(torch.float16, copy=True)


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
