"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them: W = scale * (code - zero).

Codes follow each other without gaps along K, zero-points along N, least significant bit first
(32 codes of 3 bits fill 3 words):

    qweight[:, n] = stream of codes[n, 0], codes[n, 1], ...    int32 [K bits/32, N]
    qzeros [g, :] = stream of zeros[0, g], zeros[1, g], ...    int32 [G, N bits/32]
    scales [g, n]                                              fp16  [G, N]
    g_idx  [k]    = the group of input k, else k // group_size int32 [K]

`gptq_v2` stores zero-points as they are. `gptq` (the first format) stores them less 1: at 2, 4 and
8 bits by subtracting 1 from every field of a word *with borrow*, at 3 bits field by field modulo 8.
Adding it back the same way makes every zero-point 0 .. 2**bits - 1 exact again.

What loads where, besides here: vLLM 0.32 in-tree takes symmetric weights of 4 and 8 bits without
`desc_act` (on CPUs 4 bits), and refuses the rest; up to 0.29 it took `desc_act`. transformers loads
GPTQ through optimum and GPTQModel, which read both formats. Engines in bfloat16 that keep scales in
the activations' dtype round ours.

Sources: https://github.com/ModelCloud/GPTQModel (`nn_modules/qlinear/__init__.py` for packing,
`utils/model.py` and `utils/model_dequant.py` for the first format's zero-points,
`quantization/config.py` for `dynamic`); https://arxiv.org/abs/2210.17323.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.packing import WORD_BITS, pack_stream, stream_words, unpack_stream
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.formats._gptq_config import GptqFields, served_bits, served_version
from vllm_quantkit.formats._layout import (
    SCALE_DTYPES,
    check_below,
    decode_index,
    decode_transposed,
    encode_transposed,
    unpack_rows,
)
from vllm_quantkit.formats._patterns import compact, exact_pattern
from vllm_quantkit.formats._written import cannot_store, most_frequent
from vllm_quantkit.formats.base import CheckpointTensor, Role
from vllm_quantkit.spec import (
    ActivationSpec,
    LayerRules,
    LayerShape,
    SchemeSpec,
    WeightSpec,
)

TENSORS = ("qweight", "scales", "qzeros", "g_idx")
COMPANIONS = ()

ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A word with 1 in each of its fields."""


def parse(config: Mapping[str, Any]) -> LayerRules:
    """One scheme, overridden by the first `dynamic` pattern that matches a layer's name.

    Layers that `modules_in_block_to_quantize` does not list stay in 16 bits, and so does the head
    unless `lm_head` is true.

    Raises:
        ConfigError: a key is missing, has the wrong type or a value nothing can mean.
        UnsupportedScheme: the config is well formed but not served; says what to do.
    """
    return GptqFields.read(config).rules()


def codes_name(spec: SchemeSpec) -> str:
    """`qweight`."""
    return "qweight"


def tensors(spec: SchemeSpec, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
    """qweight, scales, qzeros and g_idx of a layer.

    qzeros may lack where the spec is symmetric, g_idx where groups are in order.

    Raises:
        UnsupportedScheme: the spec is one that GPTQ cannot store.
    """
    weight, N, K = spec.weight, shape.out_features, shape.in_features
    bits, G = served_bits(weight.bits), weight.num_groups(K)
    offset = 1 if served_version(spec.variant or "gptq") == "gptq" else 0
    return (
        CheckpointTensor(
            "qweight",
            Role.CODES,
            (stream_words(K, bits), N),
            (torch.int32,),
            partial(decode_codes, bits=bits, length=K),
            partial(encode_codes, bits=bits),
        ),
        CheckpointTensor(
            "scales", Role.SCALES, (G, N), SCALE_DTYPES, decode_transposed, encode_transposed
        ),
        CheckpointTensor(
            "qzeros",
            Role.ZEROS,
            (G, stream_words(N, bits)),
            (torch.int32,),
            partial(decode_zeros, bits=bits, length=N, offset=offset),
            partial(encode_zeros, bits=bits, offset=offset),
            optional=weight.symmetric,
        ),
        CheckpointTensor(
            "g_idx",
            Role.GROUP_INDEX,
            (K,),
            (torch.int32, torch.int64),
            decode_index,
            decode_index,
            optional=not weight.act_order,
        ),
    )


def infer_shape(
    spec: SchemeSpec, shapes: Mapping[str, tuple[int, ...]], stored: tuple[int, int] | None = None
) -> LayerShape:
    """N and K from `qweight`; K from `g_idx` where there is one, since `qweight` is padded."""
    words, N = shapes["qweight"]
    K = words * WORD_BITS // spec.weight.bits
    index = shapes.get("g_idx", ())
    if len(index) == 1 and stream_words(index[0], spec.weight.bits) == words:
        K = index[0]
    return LayerShape(out_features=N, in_features=K)


def scheme(weight: WeightSpec, activation: ActivationSpec | None) -> SchemeSpec:
    """The first format for symmetric weights, which all readers take; `gptq_v2` for others.

    In the first format a zero-point of 0 borrows from its neighbour, and readers that do not carry
    get both wrong.

    Raises:
        UnsupportedScheme: not integers of 2, 3, 4 or 8 bits, or 8-bit activations.
    """
    if activation is not None or weight.code_type != "int" or weight.scale_rows != 1:
        raise cannot_store("gptq", weight, activation, "integers with 16-bit activations")
    served_bits(weight.bits)
    variant = "gptq" if weight.symmetric else "gptq_v2"
    return SchemeSpec(dialect="gptq", weight=weight, variant=variant)


def render(layers: Mapping[str, SchemeSpec], ignore: tuple[str, ...]) -> dict[str, Any]:
    """A GPTQ config: the most frequent scheme, and a rule of `dynamic` for each exception.

    The head stays in 16 bits unless `layers` names it. The rules match the layers that engines
    merge, too: vLLM asks for their names.

    Raises:
        UnsupportedScheme: layers differ in the format, of which a checkpoint has one.
    """
    default = most_frequent(layers)
    version = _common_version(layers)
    everything = (*layers, *ignore)
    kept = compact((name for name in ignore if name != "lm_head"), layers, merged=True)
    others: dict[SchemeSpec, list[str]] = defaultdict(list)
    for name, spec in layers.items():
        if spec != default:
            others[spec].append(name)
    rules = {
        f"+:{exact_pattern(entry)}": _overrides(spec, default)
        for spec, names in others.items()
        for entry in compact(names, everything, merged=True)
    }
    return {
        "quant_method": "gptq",
        **_numerics(default),
        "lm_head": "lm_head" in layers,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "dynamic": {**{f"-:{exact_pattern(entry)}": {} for entry in kept}, **rules},
    }


def _common_version(layers: Mapping[str, SchemeSpec]) -> str:
    found = {spec.variant or "gptq" for spec in layers.values()}
    if len(found) > 1:
        raise UnsupportedScheme(
            "gptq has one checkpoint_format for all layers, but symmetric layers would be stored "
            "as 'gptq' and asymmetric ones as 'gptq_v2'. Quantise all layers symmetric or all "
            "asymmetric, or use the dialect 'compressed-tensors' or 'quantkit'."
        )
    return found.pop()


def _numerics(spec: SchemeSpec) -> dict[str, Any]:
    weight = spec.weight
    return {
        "bits": weight.bits,
        "group_size": weight.group_size,
        "desc_act": weight.act_order,
        "sym": weight.symmetric,
    }


def _overrides(spec: SchemeSpec, default: SchemeSpec) -> dict[str, Any]:
    """The numerics in which `spec` differs."""
    base = _numerics(default)
    return {key: value for key, value in _numerics(spec).items() if value != base[key]}


def decode_codes(words: Tensor, bits: int, length: int) -> Tensor:
    """codes[n, k] = field k of stream words[:, n]: int32 [W, N] to uint8 [N, length]."""
    return unpack_rows(unpack_stream, words.t().contiguous(), bits, length)


def encode_codes(codes: Tensor, bits: int) -> Tensor:
    """Inverse of `decode_codes`."""
    check_below(codes, 2**bits, "GPTQ codes")
    return pack_stream(codes, bits).t().contiguous()


def decode_zeros(words: Tensor, bits: int, length: int, offset: int) -> Tensor:
    """zeros[n, g] = field n of words[g] + offset: int32 [G, W] to uint8 [length, G]."""
    if offset and bits in ONES:
        words = words + ONES[bits]
    zeros = unpack_stream(words, bits, length)
    if offset and bits not in ONES:
        zeros = (zeros + offset) & (2**bits - 1)
    return zeros.t().contiguous()


def encode_zeros(zeros: Tensor, bits: int, offset: int) -> Tensor:
    """Inverse of `decode_zeros`."""
    check_below(zeros, 2**bits, "GPTQ zero-points")
    fields = zeros.t().contiguous()
    if offset and bits not in ONES:
        fields = (fields - offset) & (2**bits - 1)
    words = pack_stream(fields, bits)
    return words - ONES[bits] if offset and bits in ONES else words
