"""The JSON that bitsandbytes stores, as bytes in a tensor, beside a weight of 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

QUANT_STATE = "weight.quant_state.bitsandbytes__"


class QuantState(BaseModel):
    """What the JSON says that decoding needs.

    Attributes:
        quant_type: the code book.
        blocksize: weights that share a scale.
        shape: (N, K); null in files without it.
        nested_blocksize: scales that share a scale of their own, where scales are quantised.
        nested_offset: what is added to every such scale.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    quant_type: Literal["nf4", "fp4"]
    blocksize: int = Field(gt=0)
    shape: list[int] | None = None
    nested_blocksize: int | None = Field(None, gt=0)
    nested_offset: float | None = None


def read_state(data: bytes) -> QuantState:
    """The state that `data` holds.

    Raises:
        ValueError: it is no JSON, or lacks a key.
    """
    try:
        return QuantState.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"its quant_state is not what bitsandbytes writes ({key}: {first['msg']}); download "
            "the file again, or save the model again"
        ) from None


def find_state(stored: Mapping[str, Tensor]) -> QuantState:
    """The state among a layer's tensors, by their name behind the layer's.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    for name, tensor in stored.items():
        if name.startswith(QUANT_STATE):
            return read_state(bytes(tensor.flatten().tolist()))
    raise ValueError(f"it lacks {QUANT_STATE}nf4 or {QUANT_STATE}fp4; add the tensor")


def block_scales(stored: Mapping[str, Tensor], state: QuantState) -> Tensor:
    """scales[b] = absmax[b], or what quantised absmax stand for, in float32 [B].

    That is nested_quant_map[absmax[b]] * nested_absmax[b // nested_blocksize] + nested_offset. It
    may be a little below 0 where all weights of a block are 0.

    Raises:
        ValueError: a tensor is missing, or does not have the size that the others need.
    """
    absmax = needed(stored, "weight.absmax").flatten()
    if absmax.dtype.is_floating_point:
        return absmax.to(torch.float32, copy=True)
    if state.nested_blocksize is None or state.nested_offset is None:
        raise ValueError(
            "its absmax is quantised, but its quant_state has no nested_blocksize and "
            "nested_offset; save the model again"
        )
    values = needed(stored, "weight.nested_quant_map").flatten().to(torch.float32)
    scales = needed(stored, "weight.nested_absmax").flatten().to(torch.float32)
    blocks = -(-absmax.numel() // state.nested_blocksize)
    if absmax.dtype != torch.uint8 or values.numel() != 256 or scales.numel() != blocks:
        raise ValueError(
            f"its quantised scales are {absmax.dtype} with a map of {values.numel()} values and "
            f"{scales.numel()} scales, but uint8, 256 and {blocks} are needed; save it again"
        )
    spread = scales.repeat_interleave(state.nested_blocksize)[: absmax.numel()]
    return values[absmax.long()] * spread + state.nested_offset


def needed(stored: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor called `name`.

    Raises:
        ValueError: it is missing.
    """
    if name not in stored:
        raise ValueError(f"it lacks {name}; add the tensor, or save the model again")
    return stored[name]
