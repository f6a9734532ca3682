"""What all launches of the cache's Triton kernels pass."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.kv_int4.layout import CacheLayout
from quantkit_kernels.kv_int4.rotation import head_rotation
from quantkit_kernels.kv_int4.treatment import Softmax

LOG2_E = 1.4426950408889634

ROWS = 16
"""Heads that a program rotates: what tensor cores take at least."""


@cache
def head_signs(head_size: int, device: torch.device) -> Tensor:
    """The signs of R, bfloat16 [D, P]; made once, before a CUDA graph is captured."""
    return head_rotation(head_size, device).sign().bfloat16()


def factor_of(softmax: Softmax) -> float:
    """What makes products logits to base 2, or logits over the softcap."""
    return softmax.scale / softmax.softcap if softmax.softcap else softmax.scale * LOG2_E


def head_of(layout: CacheLayout) -> dict[str, Any]:
    """What kernels are told about a head."""
    return {"D": layout.head_size, "HALF": layout.half}


def groups_of(layout: CacheLayout) -> dict[str, Any]:
    """What kernels are told about groups and blocks."""
    return {
        "KEY_GROUP": layout.key_dimensions,
        "VALUE_GROUP": layout.value_dimensions,
        "BS": layout.block_size,
    }


def contiguous(per_head: Tensor | None) -> Tensor | None:
    """Its numbers in one piece."""
    return None if per_head is None else per_head.contiguous()
