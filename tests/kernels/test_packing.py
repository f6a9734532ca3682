"""Bit orders: against numbers packed by hand, and there and back again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit_kernels.packing import (
    aligned_words,
    pack_aligned,
    pack_stream,
    stream_words,
    unpack_aligned,
    unpack_stream,
)

BITS = st.integers(1, 8)
LENGTHS = st.integers(1, 130)
ROWS = st.integers(1, 3)


def random_codes(rows: int, length: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, length), dtype=torch.uint8)


def bits_of(words: torch.Tensor) -> np.ndarray:
    """Every bit of each row, lowest bit of word 0 first."""
    return np.unpackbits(words.numpy().view(np.uint8), axis=-1, bitorder="little")


@given(rows=ROWS, length=LENGTHS, bits=BITS)
def test_stream_is_the_codes_bits_one_after_another(rows: int, length: int, bits: int) -> None:
    codes = random_codes(rows, length, bits)
    expected = np.unpackbits(codes.numpy()[..., None], axis=-1, bitorder="little")[..., :bits]
    found = bits_of(pack_stream(codes, bits))
    np.testing.assert_array_equal(found[:, : length * bits], expected.reshape(rows, -1))
    assert not found[:, length * bits :].any()


@given(rows=ROWS, length=LENGTHS, bits=BITS)
def test_stream_round_trip(rows: int, length: int, bits: int) -> None:
    codes = random_codes(rows, length, bits)
    words = pack_stream(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, stream_words(length, bits))
    assert torch.equal(unpack_stream(words, bits, length), codes)


@given(rows=ROWS, length=LENGTHS, bits=BITS)
def test_aligned_round_trip(rows: int, length: int, bits: int) -> None:
    codes = random_codes(rows, length, bits)
    words = pack_aligned(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, aligned_words(length, bits))
    assert torch.equal(unpack_aligned(words, bits, length), codes)


@given(length=LENGTHS, bits=st.sampled_from([1, 2, 4, 8]))
def test_the_orders_agree_where_bits_divide_a_word(length: int, bits: int) -> None:
    codes = random_codes(2, length, bits)
    assert torch.equal(pack_stream(codes, bits), pack_aligned(codes, bits))


@given(length=LENGTHS, bits=st.sampled_from([3, 5, 6, 7]))
def test_no_aligned_code_straddles_words(length: int, bits: int) -> None:
    codes = random_codes(1, length, bits)
    per_word = 32 // bits
    words = pack_aligned(codes, bits)
    for i in range(length):
        word = int(words[0, i // per_word]) & 0xFFFFFFFF
        assert word >> (bits * (i % per_word)) & (2**bits - 1) == codes[0, i]


def test_three_bit_codes_straddle_as_in_gptq() -> None:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10] = 0b101  # bits 30, 31 of word 0 and bit 0 of word 1
    expected = torch.tensor([[0b01 << 30, 0b1, 0]], dtype=torch.int32)
    assert torch.equal(pack_stream(codes, 3), expected)


@pytest.mark.parametrize("unpack", [unpack_stream, unpack_aligned])
def test_too_few_words_are_refused(unpack) -> None:
    with pytest.raises(ValueError, match="33 codes of 4 bits need 5 words"):
        unpack(torch.zeros(2, 4, dtype=torch.int32), 4, 33)


def test_packing_works_along_the_last_of_many_dimensions() -> None:
    codes = torch.randint(0, 8, (2, 3, 4, 40), dtype=torch.uint8)
    assert torch.equal(unpack_stream(pack_stream(codes, 3), 3, 40), codes)
