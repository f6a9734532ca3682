"""Keys and values of 4 bits: codes, words, rotation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit_kernels.kv_int4 import (
    CacheLayout,
    KeyTreatment,
    head_rotation,
    rotate_keys,
    rotate_queries,
    rotate_values,
    shift_products,
    unrotate,
)
from quantkit_kernels.kv_int4.reference import dequantise, pack, quantise, unpack

CPU = torch.device("cpu")
SIZES = (1, 24, 32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
NAN_WORD = 0x7E00


def plain_scales(group: list[float]) -> list[float]:
    """The scales that are tried for a group of float32 values; none where it cannot be stored."""
    one = np.float32
    if not all(math.isfinite(y) for y in group):
        return []
    low, high = min(0.0, *group), max(0.0, *group)
    spread = one(min(high - low, 3.4e38))
    scale = float(max(spread / one(15), one(2.0**-14)))
    step = 2.0 ** (math.floor(math.log2(scale)) - 6)
    scale = math.ceil(scale / step) * step
    if scale > 65504:
        return []
    scales = [scale]
    for _ in range(7):
        # A power of two is followed by numbers with half its step.
        fraction, _ = math.frexp(scale)
        step = 2.0 ** (math.floor(math.log2(scale)) - 6 - (fraction == 0.5))
        scale = max(2.0**-14, scale - step)
        scales.append(scale)
    return scales


def plain_codes(group: list[float], scale: float) -> tuple[list[int], int]:
    """Codes and zero-point at a scale, in Python's numbers."""
    one, low = np.float32, min(0.0, *group)
    zero = min(15, round(float(one(-low) / one(scale))))
    return [min(15, max(0, round(float(one(y) / one(scale))) + zero)) for y in group], zero


def plain_error(group: list[float], scale: float) -> float:
    """Sum of squared errors at a scale."""
    codes, zero = plain_codes(group, scale)
    return sum(((c - zero) * scale - y) ** 2 for c, y in zip(codes, group, strict=True))


FINITE = st.floats(-70000, 70000, width=32)


@settings(deadline=None, max_examples=150)
@given(st.lists(FINITE, min_size=32, max_size=32), st.sampled_from([1.0, 1e-3, 1e-7, 2.0**20]))
def test_quantise_is_its_definition(values: list[float], factor: float) -> None:
    y = torch.tensor(values) * factor
    codes, words = quantise(y[None], 32)
    group, word = y.tolist(), int(words[0, 0]) & 0xFFFF
    scales = plain_scales(group)
    if not scales:
        assert (word, codes[0].tolist()) == (NAN_WORD, [0] * 32)
        return
    scale = float(np.uint16(word & 0xFFF0).view(np.float16))
    assert scale in scales
    assert (codes[0].tolist(), word & 15) == plain_codes(group, scale)
    # Float32 sums cannot tell errors apart that are closer.
    assert plain_error(group, scale) <= min(plain_error(group, s) for s in scales) * (1 + 1e-4)


def test_of_scales_that_do_alike_the_first_is_taken() -> None:
    _, words = quantise(torch.zeros(1, 32), 32)
    assert int(words) == 0x0400
    y = torch.zeros(1, 32)
    y[0, 0] = 15.0
    assert int(quantise(y, 32)[1]) == 0x3C00


def test_smaller_scales_are_worth_trying() -> None:
    y = torch.randn(4096, 64)
    error = (dequantise(*quantise(y, 64)) - y).square().sum()
    largest = sum(plain_error(row, plain_scales(row)[0]) for row in y[:512].tolist()) * 8
    # 8 % in the mean; a group's error varies by 20 %, that of 512 groups by less than 1 %.
    assert 0.90 < float(error) / largest < 0.95


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 15), min_size=30, max_size=30),
    st.integers(0, 15),
    st.integers(0, 63),
    st.integers(-14, 11),
)
def test_what_codes_stand_for_has_these_codes(
    middle: list[int], zero: int, mantissa: int, exponent: int
) -> None:
    scale = (1 + mantissa / 64) * 2.0**exponent
    codes = torch.tensor([0, *middle, 15], dtype=torch.uint8)
    word = torch.tensor([scale]).half().view(torch.int16) | zero
    values = dequantise(codes, word)
    assert torch.equal(values, (codes.float() - zero) * scale)
    again = quantise(values, 32)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], word)


def test_written_out_groups() -> None:
    y = torch.zeros(4, 32)
    y[0, 0], y[0, 1], y[0, 2] = -1.0, 14.0, 3.0
    y[1, 0] = 15 * 1.1
    y[2, 3] = -15.0
    codes, words = quantise(y, 32)
    assert words.flatten().tolist() == [
        0x3C00 | 1,  # scale 1, zero-point 1
        0x3C60,  # 1.1 rounded up to 1 + 7 / 64, and 1 + 6 / 64 is nearer
        0x3C00 | 15,  # nothing positive: zero is the largest code
        0x0400,  # all zero: the smallest normal scale
    ]
    assert codes[0, :4].tolist() == [0, 15, 4, 1]
    assert codes[1, :2].tolist() == [15, 0]
    assert codes[2, 2:5].tolist() == [15, 0, 15]
    assert not codes[3].any()
    assert not dequantise(codes, words)[3].any()


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_groups_keep_their_range_through_zero(sign: int) -> None:
    y = sign * (100 + torch.rand(1, 32))
    codes, words = quantise(y, 32)
    assert codes.unique().tolist() == ([15] if sign > 0 else [0])
    assert int(words) & 15 == (0 if sign > 0 else 15)
    # A step is about 101 / 15, and the top of the range rounds to the top code.
    assert float((dequantise(codes, words) - y).abs().max()) < 101 / 15 / 2


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3e38, 65520 * 15.0])
def test_what_no_scale_holds_is_nan(poison: float) -> None:
    y = torch.randn(2, 128)
    y[1, 40] = poison
    codes, words = quantise(y, 32)
    values = dequantise(codes, words)
    assert int(words[1, 1]) == NAN_WORD
    assert bool(values[1, 32:64].isnan().all())
    assert values.isnan().sum() == 32


def test_the_largest_scale() -> None:
    y = torch.zeros(2, 32)
    y[0, 0], y[1, 0] = 65024.0 * 15, 65025.0 * 15
    codes, words = quantise(y, 32)
    assert dequantise(codes, words)[0, 0] == 65024.0 * 15
    assert int(words[1, 0]) == NAN_WORD


def test_bytes_hold_a_dimension_and_its_partner() -> None:
    codes = torch.arange(256, dtype=torch.uint8).remainder(16).reshape(2, 128)
    codes[1] = codes[1].flip(0)
    packed = pack(codes)
    assert packed.shape == (2, 64)
    assert torch.equal(packed & 15, codes[:, :64])
    assert torch.equal(packed >> 4, codes[:, 64:])
    assert torch.equal(unpack(packed), codes)


@pytest.mark.parametrize(
    ("size", "groups", "bytes_"),
    [
        (64, {}, 64 + 4 + 4),
        (80, {}, 96 + 6 + 6),
        (96, {}, 96 + 6 + 6),
        (112, {}, 128 + 8 + 4),
        (128, {}, 140),
        (128, {"key_group": 64}, 136),
        (128, {"value_group": 32}, 144),
        (192, {}, 192 + 12 + 6),
        (256, {}, 256 + 16 + 8),
    ],
)
def test_bytes_of_a_token(size: int, groups: dict[str, int], bytes_: int) -> None:
    assert CacheLayout(size, 128, **groups).token_bytes == bytes_


@pytest.mark.parametrize("size", SIZES)
def test_rotations_are_orthonormal(size: int) -> None:
    rotation = head_rotation(size, CPU).double()
    padded = -(-size // 32) * 32
    assert rotation.shape == (size, padded)
    # Entries are float32, of relative error 2^-24.
    error = rotation @ rotation.T - torch.eye(size, dtype=torch.float64)
    assert float(error.abs().max()) < 3e-7
    assert torch.allclose(rotation.abs(), torch.full_like(rotation, padded**-0.5), rtol=1e-6)


@pytest.mark.parametrize("size", [size for size in SIZES if size >= 32])
def test_rotations_spread_spikes_and_constants(size: int) -> None:
    rotation = head_rotation(size, CPU)
    padded = rotation.shape[1]
    for head in (torch.eye(size)[3], torch.ones(size), torch.arange(size) % 2 * 2.0 - 1):
        spread = head @ rotation / head.norm()
        # Perfectly even is 1; without signs a constant would be one coordinate, sqrt(P).
        assert float(spread.abs().max()) < 3.5 * padded**-0.5


def treatment(heads: int, size: int) -> KeyTreatment:
    return KeyTreatment(100 * torch.randn(heads, size), torch.randn(heads, size).exp())


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("part", ["none", "shift", "scale", "both"])
def test_products_survive_treatment_and_rotation(size: int, part: str) -> None:
    torch.manual_seed(0)
    shift, scale = treatment(2, size)
    how = KeyTreatment(
        shift if part in ("shift", "both") else None, scale if part in ("scale", "both") else None
    )
    query, key = torch.randn(5, 6, size), torch.randn(7, 2, size) + shift
    got = torch.einsum(
        "qhgp,khp->qhgk",
        rotate_queries(query, how).unflatten(1, (2, 3)).double(),
        rotate_keys(key, how).double(),
    )
    extra = shift_products(query, how)
    assert (extra is None) == (how.shift is None)
    if extra is not None:
        got = got + extra.unflatten(1, (2, 3))[..., None].double()
    want = torch.einsum("qhgp,khp->qhgk", query.unflatten(1, (2, 3)).double(), key.double())
    # Float32 rotations of keys that are 100 long in each dimension, where products cancel.
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_values_turn_back() -> None:
    value = torch.randn(3, 2, 80)
    rotated = rotate_values(value)
    assert rotated.shape == (3, 2, 96)
    # Two float32 products with entries of one size.
    assert torch.allclose(unrotate(rotated, 80), value, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotations_round_once(dtype: torch.dtype) -> None:
    key = torch.randn(3, 2, 64).to(dtype)
    how = treatment(2, 64)
    wide = rotate_keys(key.float(), how)
    assert torch.equal(rotate_keys(key, how, dtype), wide.to(dtype))
    assert torch.equal(rotate_queries(key, how, dtype), rotate_queries(key.float(), how).to(dtype))
    assert unrotate(rotate_values(key, dtype), 64, dtype).dtype == dtype


def test_a_rotation_may_be_made_first_under_inference_mode() -> None:
    head_rotation.cache_clear()
    with torch.inference_mode():
        rotate_values(torch.randn(1, 1, 32))
    value: Tensor = torch.randn(1, 1, 32, requires_grad=True)
    rotate_values(value).sum().backward()
    assert value.grad is not None
