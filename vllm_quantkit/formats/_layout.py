"""Pure tensor helpers that more than one dialect needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that scales have in checkpoints; the first is the one we write."""

BLOCK_ROWS = 64
"""Rows unpacked at a time: their int32 temporaries stay in cache, which is five times faster."""


def unpack_rows(
    unpack: Callable[[Tensor, int, int], Tensor], words: Tensor, bits: int, length: int
) -> Tensor:
    """`unpack(words, bits, length)`, block by block: int32 [R, W] to uint8 [R, length]."""
    codes = torch.empty(words.shape[0], length, dtype=torch.uint8, device=words.device)
    for start in range(0, words.shape[0], BLOCK_ROWS):
        block = words[start : start + BLOCK_ROWS]
        codes[start : start + BLOCK_ROWS] = unpack(block, bits, length)
    return codes


def decode_transposed(stored: Tensor) -> Tensor:
    """scales[n, g] = stored[g, n], in float32."""
    return stored.t().to(torch.float32, copy=True).contiguous()


def encode_transposed(scales: Tensor) -> Tensor:
    """stored[g, n] = scales[n, g], in the dtype they have."""
    return scales.t().clone(memory_format=torch.contiguous_format)


def decode_index(stored: Tensor) -> Tensor:
    """A group index as int32."""
    return stored.to(torch.int32, copy=True)


def pad_columns(values: Tensor, width: int) -> Tensor:
    """`values` with zeros appended to every row until it is `width` long."""
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]))


def representable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`scales` in `dtype`, which loses nothing.

    Raises:
        ValueError: codes were made for scales that `dtype` cannot hold.
    """
    stored = scales.to(dtype)
    lost = stored.to(scales.dtype) != scales
    if bool(lost.any()):
        raise ValueError(
            f"{int(lost.sum())} of {scales.numel()} scales cannot be stored in {dtype} as they "
            f"are, such as {scales[lost][0].item()!r}; make the codes for scales rounded to it"
        )
    return stored


def check_below(values: Tensor, limit: int, what: str) -> None:
    """Refuse codes that would spill into their neighbours.

    Raises:
        ValueError: a value is not below `limit`.
    """
    if values.numel() and int(values.max()) >= limit:
        raise ValueError(
            f"{what} must be below {limit} to be stored, but one is {int(values.max())}"
        )
