"""AWQ checkpoints, as AutoAWQ writes them: W = scale * (code - zero), 4 bits, fp16 scales.

`gemm`: K rows of packed outputs; nibble j of word w holds output 8 w + ORDER[j]:

    qweight[k, w] = sum_j codes[8 w + ORDER[j], k] << 4 j      int32 [K, N/8]
    qzeros [g, w] = sum_j zeros[8 w + ORDER[j], g] << 4 j      int32 [G, N/8]
    scales [g, n]                                              fp16  [G, N]

`gemv`: N rows of packed inputs in plain order; the group dimension is padded to P >= G:

    qweight[n, w] = sum_j codes[n, 8 w + j] << 4 j             int32 [N, K/8]
    qzeros [n, w] = sum_j zeros[n, 8 w + j] << 4 j             int32 [N, P/8]
    scales [n, g]                                              fp16  [N, P]

What loads where, besides here: vLLM in-tree takes `gemm` in groups (on CPUs, too), transformers
through GPTQModel. Engines in bfloat16 that keep scales in the activations' dtype round ours.

Sources: https://github.com/casper-hansen/AutoAWQ (`awq/modules/linear/gemm.py`, `gemv.py`, and
`awq/utils/module.py` for the substring rule of `modules_to_not_convert`);
https://arxiv.org/abs/2306.00978.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.packing import pack_aligned, unpack_aligned
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.formats._awq_config import BITS, AwqFields, served_bits, served_version
from vllm_quantkit.formats._layout import (
    SCALE_DTYPES,
    check_below,
    decode_transposed,
    encode_transposed,
    pad_columns,
    unpack_rows,
)
from vllm_quantkit.formats._patterns import merged_names
from vllm_quantkit.formats._written import cannot_store, only_scheme
from vllm_quantkit.formats.base import CheckpointTensor, Role
from vllm_quantkit.spec import (
    PER_CHANNEL,
    ActivationSpec,
    LayerRules,
    LayerShape,
    SchemeSpec,
    WeightSpec,
)

PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""GEMM: nibble j of a word holds output ORDER[j] of its eight."""

TENSORS = ("qweight", "scales", "qzeros")
COMPANIONS = ()

GEMV_GROUP_MULTIPLE = {64: 2, 32: 4}
"""GEMV pads the words of a row of zero-points to a multiple of this; 1 for 128 and more."""


def parse(config: Mapping[str, Any]) -> LayerRules:
    """One scheme for all layers but those whose name contains an entry of the skip list.

    Raises:
        ConfigError: a key is missing, has the wrong type or a value nothing can mean.
        UnsupportedScheme: the config is well formed but not served; says what to do.
    """
    return AwqFields.read(config).rules()


def codes_name(spec: SchemeSpec) -> str:
    """`qweight`."""
    return "qweight"


def tensors(spec: SchemeSpec, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
    """qweight, scales and qzeros of a layer; qzeros may lack where zero-points are all 8.

    Raises:
        UnsupportedScheme: the layer's size or the spec is one that AWQ cannot store.
    """
    served_bits(spec.weight.bits)
    if spec.weight.act_order:
        raise UnsupportedScheme(
            "AWQ cannot store act_order=True, which needs a tensor g_idx. Use the dialect 'gptq'."
        )
    if served_version(spec.variant or "gemm") == "gemv":
        return _gemv_tensors(spec.weight, shape)
    return _gemm_tensors(spec.weight, shape)


def infer_shape(
    spec: SchemeSpec, shapes: Mapping[str, tuple[int, ...]], stored: tuple[int, int] | None = None
) -> LayerShape:
    """N and K from the shape of `qweight` alone."""
    rows, columns = shapes["qweight"]
    if spec.variant == "gemv":
        return LayerShape(out_features=rows, in_features=columns * PER_WORD)
    return LayerShape(out_features=columns * PER_WORD, in_features=rows)


def scheme(weight: WeightSpec, activation: ActivationSpec | None) -> SchemeSpec:
    """4 bits in groups with zero-points, in the layout `gemm`, which is what readers take.

    Raises:
        UnsupportedScheme: other numerics.
    """
    grouped = weight.group_size != PER_CHANNEL and weight.scale_rows == 1
    asymmetric = not weight.symmetric and not weight.act_order and weight.code_type == "int"
    if activation is not None or weight.bits != BITS or not grouped or not asymmetric:
        holds = "asymmetric integers of 4 bits in groups in order, with 16-bit activations"
        raise cannot_store("awq", weight, activation, holds)
    return SchemeSpec(dialect="awq", weight=weight, variant="gemm")


def render(layers: Mapping[str, SchemeSpec], ignore: tuple[str, ...]) -> dict[str, Any]:
    """An AWQ config: one scheme, and parts of the names in `ignore` that no quantised layer has.

    The head stays in 16 bits unless `layers` names it. Symmetric weights are declared with
    `zero_point: true` and stored with zero-points of 8: AutoAWQ and vLLM in-tree cannot load AWQ
    without `qzeros`.

    Raises:
        UnsupportedScheme: several schemes, or a name to ignore that is part of a quantised layer's.
    """
    spec = only_scheme("awq", layers)
    return {
        "quant_method": "awq",
        "bits": spec.weight.bits,
        "group_size": spec.weight.group_size,
        "zero_point": True,
        "version": spec.variant or "gemm",
        "lm_head": "lm_head" in layers,
        "modules_to_not_convert": _distinct_parts(ignore, layers) or None,
    }


def _distinct_parts(ignore: tuple[str, ...], layers: Collection[str]) -> list[str]:
    """Ends of the names in `ignore`, as short as no quantised layer has them in its name."""
    quantised = "\n".join((*layers, *merged_names(layers)))
    return list(dict.fromkeys(_distinct_part(name, quantised) for name in ignore))


def _distinct_part(name: str, quantised: str) -> str:
    parts = name.split(".")
    for start in reversed(range(len(parts))):
        end = ".".join(parts[start:])
        if not parts[start].isdecimal() and end not in quantised:
            return end
    raise UnsupportedScheme(
        f"awq leaves a layer in 16 bits by a part of its name, but {name!r} is part of a quantised "
        "layer's name, too. Quantise the layer, or use the dialect 'compressed-tensors'."
    )


def _gemm_tensors(weight: WeightSpec, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
    N, K, G = shape.out_features, shape.in_features, weight.num_groups(shape.in_features)
    _check_divisible("gemm", "out_features", N)
    words = N // PER_WORD
    return (
        CheckpointTensor(
            "qweight", Role.CODES, (K, words), (torch.int32,), decode_gemm, encode_gemm
        ),
        CheckpointTensor(
            "scales", Role.SCALES, (G, N), SCALE_DTYPES, decode_transposed, encode_transposed
        ),
        CheckpointTensor(
            "qzeros",
            Role.ZEROS,
            (G, words),
            (torch.int32,),
            decode_gemm,
            encode_gemm,
            optional=weight.symmetric,
        ),
    )


def _gemv_tensors(weight: WeightSpec, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
    N, K, G = shape.out_features, shape.in_features, weight.num_groups(shape.in_features)
    _check_divisible("gemv", "in_features", K)
    words = gemv_group_words(K, weight.group_size)
    return (
        CheckpointTensor(
            "qweight",
            Role.CODES,
            (N, K // PER_WORD),
            (torch.int32,),
            partial(_unpack, length=K),
            partial(pack_aligned, bits=BITS),
        ),
        CheckpointTensor(
            "scales",
            Role.SCALES,
            (N, words * PER_WORD),
            SCALE_DTYPES,
            partial(_decode_gemv_scales, groups=G),
            partial(_encode_gemv_scales, width=words * PER_WORD),
        ),
        CheckpointTensor(
            "qzeros",
            Role.ZEROS,
            (N, words),
            (torch.int32,),
            partial(_unpack, length=G),
            partial(_encode_gemv_zeros, width=words * PER_WORD),
            optional=weight.symmetric,
        ),
    )


def decode_gemm(words: Tensor) -> Tensor:
    """codes[8 w + ORDER[j], r] = (words[r, w] >> 4 j) & 15: int32 [R, N/8] to uint8 [N, R]."""
    columns = words.t().contiguous()
    size = (columns.shape[0], PER_WORD, columns.shape[1])
    codes = torch.empty(size, dtype=torch.uint8, device=words.device)
    for nibble, output in enumerate(ORDER):
        codes[:, output] = (columns >> (BITS * nibble)) & 15
    return codes.flatten(0, 1)


def encode_gemm(codes: Tensor) -> Tensor:
    """Inverse of `decode_gemm`: uint8 [N, R] to int32 [R, N/8]."""
    check_below(codes, 2**BITS, "AWQ codes and zero-points")
    octets = codes.reshape(-1, PER_WORD, codes.shape[1])
    columns = torch.zeros(octets.shape[0], octets.shape[2], dtype=torch.int32, device=codes.device)
    for nibble, output in enumerate(ORDER):
        columns |= octets[:, output].to(torch.int32) << (BITS * nibble)
    return columns.t().contiguous()


def gemv_group_words(in_features: int, group_size: int) -> int:
    """Words in a padded row of GEMV zero-points.

    Raises:
        UnsupportedScheme: GEMV has no layout for this group size.
    """
    size = in_features if group_size == PER_CHANNEL else group_size
    multiple = 1 if size >= 128 else GEMV_GROUP_MULTIPLE.get(size, 0)
    if multiple == 0 or in_features % size:
        raise UnsupportedScheme(
            f"AWQ version 'gemv' cannot store group_size {group_size} with {in_features} inputs: "
            "it takes 32, 64, or 128 and more, and a whole number of groups. Use version 'gemm'."
        )
    words = -(-(in_features // size) // PER_WORD)
    return -(-words // multiple) * multiple


def _unpack(words: Tensor, length: int) -> Tensor:
    return unpack_rows(unpack_aligned, words, BITS, length)


def _decode_gemv_scales(stored: Tensor, groups: int) -> Tensor:
    return stored[:, :groups].to(torch.float32, copy=True).contiguous()


def _encode_gemv_scales(scales: Tensor, width: int) -> Tensor:
    return pad_columns(scales, width)


def _encode_gemv_zeros(zeros: Tensor, width: int) -> Tensor:
    check_below(zeros, 2**BITS, "AWQ zero-points")
    return pack_aligned(pad_columns(zeros, width), BITS)


def _check_divisible(version: str, name: str, size: int) -> None:
    if size % PER_WORD:
        raise UnsupportedScheme(
            f"AWQ version {version!r} cannot store a layer with {name}={size}: it packs "
            f"{PER_WORD} codes a word and pads none. Keep the layer in 16 bits, or use "
            "the dialect 'compressed-tensors', which pads."
        )
