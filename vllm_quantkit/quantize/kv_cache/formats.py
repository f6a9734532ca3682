"""Keys and values as a cache gives them back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit_kernels.kv_int4 import (
    CacheLayout,
    KeyTreatment,
    rotate_keys,
    rotate_values,
    unrotate,
)
from quantkit_kernels.kv_int4.reference import dequantise, quantise

RoundTrip = Callable[[Tensor], Tensor]
"""float32 [T, kv_heads, D] to what the cache makes of it."""

LARGEST_E4M3 = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class CacheFormat:
    """A way to store keys and values.

    Attributes:
        key: what becomes of keys.
        value: what becomes of values.
    """

    key: RoundTrip
    value: RoundTrip


def int4_keys(layout: CacheLayout, treatment: KeyTreatment) -> RoundTrip:
    """k^ = mu + lambda * (Q(((k - mu) / lambda) R) R^T); what 4 bits cannot hold becomes mu."""

    def round_trip(key: Tensor) -> Tensor:
        back = _int4(rotate_keys(key, treatment), layout.key_dimensions, layout.head_size)
        if treatment.scale is not None:
            back = back * treatment.scale
        return back if treatment.shift is None else back + treatment.shift

    return round_trip


def int4_values(layout: CacheLayout) -> RoundTrip:
    """v^ = Q(v R) R^T."""

    def round_trip(value: Tensor) -> Tensor:
        return _int4(rotate_values(value), layout.value_dimensions, layout.head_size)

    return round_trip


def e4m3(scale: float) -> RoundTrip:
    """x^ = scale * E4M3(x / scale), saturating."""

    def round_trip(values: Tensor) -> Tensor:
        scaled = (values / scale).clamp(-LARGEST_E4M3, LARGEST_E4M3)
        return scaled.to(torch.float8_e4m3fn).float() * scale

    return round_trip


def _int4(rotated: Tensor, group: int, head_size: int) -> Tensor:
    codes, words = quantise(rotated, group)
    return unrotate(dequantise(codes, words).nan_to_num(0), head_size)
