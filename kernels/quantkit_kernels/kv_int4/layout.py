"""Where keys and values of 4 bits lie in a block of the cache.

A block of `block_size` tokens of one KV head is four planes, one behind the other:

    key codes    [block_size, half]   byte i: dimension i in the low nibble, i + half in the high
    value codes  [block_size, half], or [half, block_size] where `value_columns`
    key words    [key_groups, block_size]  uint16
    value words  [value_groups, block_size]

A word is a float16 scale whose 4 low mantissa bits hold the group's zero-point:
value = (code - zero) * scale. Dimensions are those of the rotated, padded head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DIMENSIONS = 32
"""A head is padded with zeros to a multiple of it, and a group never spans more than two."""

KEY_GROUPS = (32, 64)
"""Dimensions of a key that may share a scale."""

BLOCK_TOKENS = 16
"""A block holds a multiple of it, so that every plane begins at a multiple of 16 bytes."""

LARGEST_HEAD = 256


class Planes(NamedTuple):
    """Views of a cache.

    Attributes:
        key_codes: uint8 [blocks, heads, block_size, half].
        value_codes: uint8 [blocks, heads, block_size, half] or [blocks, heads, half, block_size].
        key_words: int16 [blocks, heads, key_groups, block_size].
        value_words: int16 [blocks, heads, value_groups, block_size].
    """

    key_codes: Tensor
    value_codes: Tensor
    key_words: Tensor
    value_words: Tensor


@dataclass(frozen=True)
class CacheLayout:
    """The format of one layer's cache.

    Attributes:
        head_size: dimensions of a key and of a value, D.
        block_size: tokens in a block.
        key_group: dimensions of a key that share a word, where they cut the padded head in equal
            parts; else 32.
        value_group: the same for values.
        value_columns: True where a value's dimension is contiguous over tokens (GPUs).
    """

    head_size: int
    block_size: int
    key_group: int = 32
    value_group: int = 64
    value_columns: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.head_size <= LARGEST_HEAD:
            raise ValueError(
                f"head_size is {self.head_size}; keys and values of 4 bits have heads of at most "
                f"{LARGEST_HEAD} dimensions"
            )
        if self.block_size < 1 or self.block_size % BLOCK_TOKENS:
            raise ValueError(
                f"block_size is {self.block_size}; a block holds a multiple of {BLOCK_TOKENS} "
                "tokens"
            )
        for name, group in (("key_group", self.key_group), ("value_group", self.value_group)):
            if group not in KEY_GROUPS:
                raise ValueError(f"{name} is {group}; use one of {KEY_GROUPS}")

    @property
    def padded_size(self) -> int:
        """Dimensions of a head in the cache, P."""
        return -(-self.head_size // DIMENSIONS) * DIMENSIONS

    @property
    def half(self) -> int:
        """Bytes of a head's codes: dimensions i and i + half share byte i."""
        return self.padded_size // 2

    @property
    def key_dimensions(self) -> int:
        """Dimensions of a key group: `key_group`, or 32 where that does not cut P."""
        return _divisor(self.padded_size, self.key_group)

    @property
    def value_dimensions(self) -> int:
        """Dimensions of a value group."""
        return _divisor(self.padded_size, self.value_group)

    @property
    def key_groups(self) -> int:
        """Words of a key."""
        return self.padded_size // self.key_dimensions

    @property
    def value_groups(self) -> int:
        """Words of a value."""
        return self.padded_size // self.value_dimensions

    @property
    def token_bytes(self) -> int:
        """Bytes of a token and head: 140 at D = 128."""
        return self.padded_size + 2 * (self.key_groups + self.value_groups)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block and head."""
        return self.block_size * self.token_bytes

    @property
    def value_codes_at(self) -> int:
        """Where the value codes of a block begin."""
        return self.block_size * self.half

    @property
    def key_words_at(self) -> int:
        """Where the key words of a block begin."""
        return self.block_size * self.padded_size

    @property
    def value_words_at(self) -> int:
        """Where the value words of a block begin."""
        return self.key_words_at + 2 * self.block_size * self.key_groups

    def check(self, cache: Tensor) -> None:
        """A cache is uint8 [blocks, heads, block_size, token_bytes], a block and head in one piece.

        Raises:
            ValueError: it is not.
        """
        expected = (self.block_size, self.token_bytes)
        if cache.dtype != torch.uint8 or cache.dim() != 4 or cache.shape[2:] != expected:
            raise ValueError(
                f"the cache is {cache.dtype} {tuple(cache.shape)}; heads of {self.head_size} "
                f"dimensions in blocks of {self.block_size} tokens need torch.uint8 "
                f"(blocks, heads, {self.block_size}, {self.token_bytes})"
            )
        if cache.stride()[2:] != (self.token_bytes, 1):
            raise ValueError(
                f"the cache has strides {cache.stride()}; the bytes of a block and head lie in one "
                f"piece, so the last two are ({self.token_bytes}, 1)"
            )

    def planes(self, cache: Tensor) -> Planes:
        """The planes of a cache, as views of it.

        Args:
            cache: uint8 [blocks, heads, block_size, token_bytes].

        Raises:
            ValueError: it has another shape, dtype or order of bytes.
        """
        self.check(cache)
        bytes_ = cache.flatten(2)
        keys = bytes_[..., : self.value_codes_at].unflatten(2, (self.block_size, self.half))
        shape = (self.half, self.block_size) if self.value_columns else (self.block_size, self.half)
        values = bytes_[..., self.value_codes_at : self.key_words_at].unflatten(2, shape)
        words = bytes_[..., self.key_words_at :].view(torch.int16)
        cut = self.block_size * self.key_groups
        return Planes(
            keys,
            values,
            words[..., :cut].unflatten(2, (self.key_groups, self.block_size)),
            words[..., cut:].unflatten(2, (self.value_groups, self.block_size)),
        )


def _divisor(padded: int, group: int) -> int:
    """A head is at least two groups: small ones are those that 4 bits harm most."""
    return group if padded % group == 0 and padded > group else DIMENSIONS
