"""FP8 weights: scales per tensor, channel or block, codes rounded to the nearest 8-bit float.

Formats: Micikevicius et al., "FP8 formats for deep learning", https://arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_kernels.code_types import FLOAT8_DTYPES
from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.quantize.methods.rtn import finite_weight, group_width, round_scales
from vllm_quantkit.spec import ALL_ROWS, WeightSpec

ROWS = 64
"""Rows worked on at a time: no float32 copy of the whole weight is made."""


def quantize_float8(
    weight: Tensor, spec: WeightSpec, *, scale_dtype: torch.dtype = torch.float32
) -> QuantizedWeight:
    """W ~ scale * float8(W / scale), scale = max |W| / largest float8, over each block of W.

    Args:
        weight: float [N, K].
        spec: code type `e4m3` or `e5m2`; a block is `scale_rows` x `group_size`.
        scale_dtype: what the checkpoint stores scales in; codes are made for the rounded scale.

    Raises:
        QuantkitError: the weight is not finite, or too large for `scale_dtype`.
    """
    dtype = FLOAT8_DTYPES[spec.code_type]
    largest = torch.finfo(dtype).max
    width = group_width(spec, weight.shape[1])
    maxima = torch.cat([_group_maxima(block, width) for block in weight.split(ROWS)])
    scales = round_scales(_shared(maxima, spec.scale_rows) / largest, scale_dtype)
    group_index = torch.arange(weight.shape[1], device=weight.device) // width
    codes = torch.empty_like(weight, dtype=dtype)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        scaled = weight[rows].float() / scales[rows][:, group_index]
        codes[rows] = scaled.clamp_(-largest, largest).to(dtype)
    return QuantizedWeight(
        codes=codes.view(torch.uint8),
        scales=scales,
        zeros=torch.zeros_like(scales, dtype=torch.uint8),
        group_index=group_index.to(torch.int32),
        bits=spec.bits,
        code_type=spec.code_type,
    )


def _group_maxima(weight: Tensor, width: int) -> Tensor:
    """max |W| over the groups of a few rows: float32 [N, ceil(K / width)]."""
    padded = torch.nn.functional.pad(finite_weight(weight), (0, -weight.shape[1] % width))
    return padded.view(len(weight), -1, width).abs().amax(-1)


def _shared(maxima: Tensor, scale_rows: int) -> Tensor:
    """The largest of each `scale_rows` rows of [N, G], in all of these rows."""
    rows = len(maxima)
    if scale_rows == ALL_ROWS:
        return maxima.amax(0, keepdim=True).expand(rows, -1).contiguous()
    blocks = torch.nn.functional.pad(maxima, (0, 0, 0, -rows % scale_rows))
    blocks = blocks.view(-1, scale_rows, maxima.shape[1]).amax(1)
    return blocks.repeat_interleave(scale_rows, dim=0)[:rows].contiguous()
