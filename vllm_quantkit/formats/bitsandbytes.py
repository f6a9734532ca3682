"""bitsandbytes checkpoints: LLM.int8() with a scale per channel, or 4 bits in blocks.

`load_in_8bit`: W[n, k] = SCB[n] / 127 * weight[n, k], multiplied with int8 activations per token;
channels with activations above `llm_int8_threshold` are multiplied in 16 bits.

    weight                              int8   [N, K]
    SCB             largest magnitude   float  [N]
    weight_format   may be there; 0     uint8  []

`load_in_4bit`: the weight is a run of N K codes in row-major order, two to a byte, the first in the
high bits; b = (n K + k) // blocksize. W[n, k] = absmax[b] * quant_map[code[n, k]].

    weight                                       uint8  [N K / 2, 1]
    weight.absmax                                float or uint8 [B]
    weight.quant_map                             float  [16]
    weight.quant_state.bitsandbytes__<type>      JSON in uint8: shape, blocksize and so on
    weight.nested_absmax, weight.nested_quant_map
        where absmax is uint8, and is itself nested_quant_map[.] * nested_absmax[b //
        nested_blocksize] + nested_offset        float  [ceil(B / nested_blocksize)], [256]

These need one another to be read, so `tensors` gives the codes alone, and `assemble` all of it.

Names: an entry of `llm_int8_skip_modules` is a module, wherever in the tree, with all inside it.
Without such a list, the head stays in 16 bits.

Sources: https://github.com/bitsandbytes-foundation/bitsandbytes (`functional.py`, QuantState and
quantize_4bit; `nn/modules.py`, Linear8bitLt); https://arxiv.org/abs/2208.07339 (LLM.int8());
https://arxiv.org/abs/2305.14314 (NF4, double quantisation).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Never

import torch
from torch import Tensor

from quantkit_kernels.code_types import CODE_BOOKS, code_values
from vllm_quantkit.errors import CheckpointError, UnsupportedScheme
from vllm_quantkit.formats._bitsandbytes_config import BitsandbytesFields
from vllm_quantkit.formats._bitsandbytes_state import (
    QUANT_STATE,
    QuantState,
    block_scales,
    find_state,
    needed,
    read_state,
)
from vllm_quantkit.formats._eight_bit import SCALE_DTYPES, weight_tensor
from vllm_quantkit.formats._fp8_config import skip_list
from vllm_quantkit.formats._layout import check_below
from vllm_quantkit.formats._written import not_written, only_scheme
from vllm_quantkit.formats.base import CheckpointTensor, Role
from vllm_quantkit.spec import (
    ActivationSpec,
    LayerRules,
    LayerShape,
    SchemeSpec,
    WeightSpec,
)

TENSORS = ("weight", "SCB", "weight_format")
COMPANIONS = (
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    *(f"{QUANT_STATE}{code_type}" for code_type in CODE_BOOKS),
)

__all__ = [
    "COMPANIONS",
    "QUANT_STATE",
    "TENSORS",
    "assemble",
    "codes_name",
    "infer_shape",
    "parse",
    "read_state",
    "render",
    "scheme",
    "tensors",
]

LARGEST = 127
"""The code of the largest magnitude of a row in int8."""

MAP_TOLERANCE = 1e-5
"""How far a stored code book may be from ours: the rounding of older tables, in six digits."""


def parse(config: Mapping[str, Any]) -> LayerRules:
    """One scheme for all layers but those of the skip list, or without one, the head.

    Raises:
        ConfigError: a key has the wrong type or a value nothing can mean.
        UnsupportedScheme: the config is well formed but not served; says what to do.
    """
    return BitsandbytesFields.read(config).rules()


def codes_name(spec: SchemeSpec) -> str:
    """`weight`."""
    return "weight"


def tensors(spec: SchemeSpec, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
    """weight, SCB and weight_format in 8 bits; the codes alone in 4, see `assemble`.

    Raises:
        UnsupportedScheme: the spec is one that the dialect cannot store.
    """
    N, K = shape.out_features, shape.in_features
    if _is_four_bits(spec):
        size = -(-N * K // 2)
        decode = partial(decode_nibbles, rows=N, columns=K)
        return (
            CheckpointTensor(
                "weight",
                Role.CODES,
                (size, 1),
                (torch.uint8,),
                decode,
                encode_nibbles,
                other_shapes=((1, size),),
            ),
        )
    return (
        weight_tensor(spec.weight, shape),
        CheckpointTensor("SCB", Role.SCALES, (N,), SCALE_DTYPES, decode_maxima, encode_maxima),
        CheckpointTensor(
            "weight_format",
            Role.MARK,
            (),
            (torch.uint8,),
            check_row_order,
            check_row_order,
            optional=True,
            other_shapes=((1,),),
        ),
    )


def infer_shape(
    spec: SchemeSpec, shapes: Mapping[str, tuple[int, ...]], stored: tuple[int, int] | None = None
) -> LayerShape:
    """N and K from the shape of `weight` in 8 bits, from the stored JSON in 4.

    Raises:
        CheckpointError: a tensor that goes with 4 bits is missing, or its JSON holds no size.
    """
    if not _is_four_bits(spec):
        N, K = shapes["weight"]
        return LayerShape(out_features=N, in_features=K)
    state = f"{QUANT_STATE}{spec.weight.code_type}"
    for name in ("weight.absmax", "weight.quant_map", state):
        if name not in shapes:
            raise CheckpointError(
                f"{name} is missing; the layer has {', '.join(sorted(shapes))}. Add the tensor, "
                "or correct the config if the layer has another scheme."
            )
    if stored is None:
        raise CheckpointError(f"{state} holds no shape of the weight. Save the model again.")
    return LayerShape(out_features=stored[0], in_features=stored[1])


def assemble(
    stored: Mapping[str, Tensor], shape: LayerShape, spec: SchemeSpec
) -> dict[Role, Tensor]:
    """Codes and scales of a layer in 4 bits.

    Args:
        stored: `weight` and its companions, by their name behind the layer's.
        shape: the whole layer's size.
        spec: the layer's scheme.

    Returns:
        CODES uint8 [N, K] and SCALES float32 [N, K / blocksize].

    Raises:
        ValueError: a tensor is missing or does not fit the others, the spec or the shape; one
            sentence that goes on from the layer's name.
    """
    N, K = shape.out_features, shape.in_features
    state = find_state(stored)
    _check_state(state, shape, spec)
    _check_code_book(stored, spec)
    scales = block_scales(stored, state)
    weight = needed(stored, "weight")
    blocks = N * K // state.blocksize
    if weight.numel() != N * K // 2 or weight.dtype != torch.uint8 or scales.numel() != blocks:
        raise ValueError(
            f"its {weight.numel()} elements of {weight.dtype} and {scales.numel()} scales do not "
            f"fit {N} x {K} weights, which need {N * K // 2} of torch.uint8 and {blocks}; save "
            "the model again"
        )
    codes = decode_nibbles(weight, rows=N, columns=K)
    return {Role.CODES: codes, Role.SCALES: scales.view(N, K // state.blocksize)}


def scheme(weight: WeightSpec, activation: ActivationSpec | None) -> Never:
    """Nothing is quantised to this dialect.

    Raises:
        UnsupportedScheme: always.
    """
    raise not_written("bitsandbytes")


def render(layers: Mapping[str, SchemeSpec], ignore: tuple[str, ...]) -> dict[str, Any]:
    """A bitsandbytes config of 8 bits; `ignore` holds names of modules. The head is ignored.

    Raises:
        UnsupportedScheme: several schemes, 4 bits, which are not written, or what the dialect
            cannot store.
    """
    spec = only_scheme("bitsandbytes", layers)
    if _is_four_bits(spec):
        raise UnsupportedScheme(
            "4 bits of bitsandbytes are read, but not written. Use the dialect "
            "'compressed-tensors' to write integers of 4 bits."
        )
    threshold = spec.activation.outlier_threshold if spec.activation else None
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": threshold or 0.0,
        "llm_int8_skip_modules": skip_list(ignore),
    }


def decode_nibbles(stored: Tensor, rows: int, columns: int) -> Tensor:
    """codes of 4 bits, the first of a byte in its high bits: uint8 [.., ..] to [rows, columns]."""
    flat = stored.flatten()
    codes = torch.stack((flat >> 4, flat & 15), dim=1).flatten()
    return codes[: rows * columns].view(rows, columns)


def encode_nibbles(codes: Tensor) -> Tensor:
    """Inverse of `decode_nibbles`: uint8 [N, K] to [ceil(N K / 2), 1]."""
    check_below(codes, 16, "codes of 4 bits")
    flat = codes.flatten()
    pairs = torch.nn.functional.pad(flat, (0, flat.numel() % 2)).view(-1, 2)
    return ((pairs[:, 0] << 4) | pairs[:, 1])[:, None]


def decode_maxima(stored: Tensor) -> Tensor:
    """scales[n] = SCB[n] / 127: float [N] to float32 [N, 1]."""
    return (stored.to(torch.float32) / LARGEST)[:, None]


def encode_maxima(scales: Tensor) -> Tensor:
    """Inverse of `decode_maxima`."""
    return scales[:, 0] * LARGEST


def check_row_order(stored: Tensor) -> Tensor:
    """A copy of the mark, if it says that rows are stored in order.

    Raises:
        ValueError: it names a layout of an older GPU kernel.
    """
    if int(stored) != 0:
        raise ValueError(
            f"weight_format {int(stored)} is a layout of one GPU's kernels, and only 0, rows in "
            "order, is served; load the model with bitsandbytes and save it again"
        )
    return stored.clone()


def _check_state(state: QuantState, shape: LayerShape, spec: SchemeSpec) -> None:
    weight, size = spec.weight, [shape.out_features, shape.in_features]
    found = (state.quant_type, state.blocksize, state.shape or size)
    expected = (weight.code_type, weight.group_size, size)
    if found != expected:
        raise ValueError(
            "its quant_state says {}, blocks of {} and shape {}, but {}, {} and {} are "
            "expected; quantise again as the config says".format(*found, *expected)
        )
    if shape.in_features % state.blocksize:
        raise ValueError(
            f"its rows of {shape.in_features} weights are no multiple of the block size "
            f"{state.blocksize}, so that blocks cross rows; keep the layer in 16 bits"
        )


def _check_code_book(stored: Mapping[str, Tensor], spec: SchemeSpec) -> None:
    found = needed(stored, "weight.quant_map").flatten().to("cpu", torch.float32)
    expected = code_values(spec.weight.code_type)
    if found.shape != expected.shape or not torch.allclose(
        found, expected, rtol=0, atol=MAP_TOLERANCE
    ):
        raise ValueError(
            f"its quant_map is not the code book of {spec.weight.code_type!r}; quantise again "
            "with 'nf4'"
        )


def _is_four_bits(spec: SchemeSpec) -> bool:
    weight = spec.weight
    if weight.bits == 4 and weight.code_type in CODE_BOOKS:
        return True
    if weight.bits == 8 and weight.code_type == "int" and weight.scale_rows == 1:
        return False
    raise UnsupportedScheme(
        f"bitsandbytes cannot store {weight.bits} bits of {weight.code_type!r}: it holds int8 with "
        "a scale per channel, 'nf4' and 'fp4'. Use the dialect 'compressed-tensors'."
    )
