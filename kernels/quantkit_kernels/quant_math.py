"""Rounding: the only code that turns real weights into integer codes and back."""

import torch
from torch import Tensor


def quantize_codes(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """codes = clamp(round(weight / scales) + zeros, 0, 2**bits - 1), rounding half to even.

    Args:
        weight: float [..., G, g].
        scales: float [..., G, 1], positive.
        zeros: integer-valued [..., G, 1].
        bits: 2 to 8.

    Returns:
        uint8, shaped as `weight`.
    """
    return (torch.round(weight / scales) + zeros).clamp_(0, 2**bits - 1).to(torch.uint8)


def dequantize_codes(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """weight = scales * (codes - zeros), in the dtype of `scales`.

    Args:
        codes: uint8 [..., G, g].
        scales: float [..., G, 1].
        zeros: integer-valued [..., G, 1].
    """
    return (codes.to(scales.dtype) - zeros.to(scales.dtype)) * scales


def minmax_scales(weight: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of each last-dimension group that just cover its range.

    Symmetric: scale = 2 max|w| / (2**bits - 1), zero = 2**(bits - 1).
    Asymmetric: scale = (max - min) / (2**bits - 1) over a range that includes 0,
    zero = round(-min / scale).

    Args:
        weight: float [..., G, g].
        bits: 2 to 8.
        symmetric: see above.

    Returns:
        scales [..., G, 1] in the dtype of `weight`, at least the smallest normal number;
        zeros [..., G, 1] uint8.
    """
    levels = 2**bits - 1
    tiny = torch.finfo(weight.dtype).tiny
    if symmetric:
        scales = (weight.abs().amax(-1, keepdim=True) * 2 / levels).clamp_min(tiny)
        return scales, torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
    low = weight.amin(-1, keepdim=True).clamp_max(0)
    high = weight.amax(-1, keepdim=True).clamp_min(0)
    scales = ((high - low) / levels).clamp_min(tiny)
    zeros = torch.round(-low / scales).clamp_(0, levels).to(torch.uint8)
    return scales, zeros
