"""How weights lie in memory for the CPU kernels: panels of 32 output columns.

16 lanes load the codes of 16 columns at once. The layout is the same for every CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.cpu.arithmetic import PANEL

ROWS = 8 * PANEL
"""Rows packed at a time: their int32 temporaries stay small beside the weight."""


def pack_codes(codes: Tensor, bits: int, *, centre: int, columns: int) -> Tensor:
    """uint8 [N, K] to int32 [N/32, columns * bits / 32, 32]: code - centre, in two's complement.

    A word holds 32 / bits channels of one column, channel 2 i + h at bit i * bits + 16 h.

    Args:
        codes: each below 2**8.
        bits: of a stored code, 4 or 8.
        centre: the code stored as 0, which fills channels beyond K.
        columns: channels to store, at least K.
    """
    padded = -(-len(codes) // PANEL)
    packed = torch.empty(padded, columns * bits // 32, PANEL, dtype=torch.int32)
    for start in range(0, len(codes), ROWS):
        words = _words(codes[start : start + ROWS].to(torch.int32) - centre, bits, columns)
        packed[start // PANEL : (start + ROWS) // PANEL] = panels(words)
    return packed


def _words(codes: Tensor, bits: int, columns: int) -> Tensor:
    """int32 [N, K] to int32 [N, columns * bits / 32]."""
    padded = torch.nn.functional.pad(codes, (0, columns - codes.shape[1]))
    masked = (padded & (2**bits - 1)).unflatten(1, (-1, 16 // bits, 2))
    words = torch.zeros(masked.shape[:2], dtype=torch.int32)
    for pair in range(16 // bits):
        for half in (0, 1):
            words |= masked[..., pair, half] << (pair * bits + 16 * half)
    return words


def panels(values: Tensor) -> Tensor:
    """[N, L] to [ceil(N / 32), L, 32], padded with zeros."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % PANEL))
    cut: Tensor = padded.unflatten(0, (-1, PANEL))
    return cut.transpose(1, 2).contiguous()


def pad_bias(bias: Tensor | None, columns: int) -> Tensor | None:
    """float32 [columns], zero beyond the bias."""
    if bias is None:
        return None
    missing = columns - bias.numel()
    padded = torch.nn.functional.pad(bias.float(), (0, missing)) if missing else bias.float()
    return padded.contiguous()
