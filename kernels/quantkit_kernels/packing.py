"""Bit packing: the only module that knows in which order codes lie in a word.

Two orders occur in checkpoints. `stream`: codes follow each other without gaps, straddling words
(GPTQ at 2, 3, 4, 8 bits). `aligned`: each 32-bit word holds floor(32 / bits) whole codes and the
top bits stay unused (compressed-tensors at 3, 5, 6, 7 bits). They agree where bits divides 32.
Code 0 lies in the lowest bits of word 0.
"""

import torch
from torch import Tensor

WORD_BITS = 32


def stream_words(length: int, bits: int) -> int:
    """ceil(length * bits / 32): int32 words that hold `length` codes without gaps."""
    return -(-length * bits // WORD_BITS)


def aligned_words(length: int, bits: int) -> int:
    """ceil(length / floor(32 / bits)): int32 words that hold `length` codes, none straddling."""
    return -(-length // (WORD_BITS // bits))


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """words[..., w] = sum_i codes[..., i] << (i * bits), cut into 32-bit words.

    Args:
        codes: uint8 [..., L], each below 2**bits.
        bits: 1 to 8.

    Returns:
        int32 [..., stream_words(L, bits)]; unused high bits are zero.
    """
    length = codes.shape[-1]
    words = stream_words(length, bits)
    if WORD_BITS % bits == 0:
        return pack_aligned(codes, bits)
    flat = torch.zeros(*codes.shape[:-1], words, dtype=torch.int64, device=codes.device)
    for start in range(WORD_BITS):  # codes start, start + 32, ...: one shift each
        part = codes[..., start::WORD_BITS].to(torch.int64)
        if part.shape[-1] == 0:
            break
        word, shift = divmod(start * bits, WORD_BITS)
        shifted = part << shift
        flat[..., word::bits][..., : part.shape[-1]] |= shifted & 0xFFFFFFFF
        if shift + bits > WORD_BITS:
            flat[..., word + 1 :: bits][..., : part.shape[-1]] |= shifted >> WORD_BITS
    return _to_int32(flat)


def unpack_stream(words: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of `pack_stream`: int32 [..., W] to uint8 [..., length]."""
    _check_capacity(words, stream_words(length, bits), bits, length)
    if WORD_BITS % bits == 0:
        return unpack_aligned(words, bits, length)
    wide = words.to(torch.int64) & 0xFFFFFFFF
    wide = torch.nn.functional.pad(wide, (0, 1))
    position = torch.arange(length, device=words.device) * bits
    low, shift = position // WORD_BITS, position % WORD_BITS
    pair = wide[..., low] | (wide[..., low + 1] << WORD_BITS)
    return ((pair >> shift) & ((1 << bits) - 1)).to(torch.uint8)


def pack_aligned(codes: Tensor, bits: int) -> Tensor:
    """words[..., w] = sum_i codes[..., w * p + i] << (i * bits), p = floor(32 / bits).

    Args:
        codes: uint8 [..., L], each below 2**bits.
        bits: 1 to 8.

    Returns:
        int32 [..., aligned_words(L, bits)]; unused high bits are zero.
    """
    per_word = WORD_BITS // bits
    words = aligned_words(codes.shape[-1], bits)
    if bits == 8:  # a word's bytes are its codes
        missing = words * per_word - codes.shape[-1]
        padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, missing))
        return padded.reshape(-1).view(torch.int32).view(*codes.shape[:-1], words)
    packed = torch.zeros(*codes.shape[:-1], words, dtype=torch.int64, device=codes.device)
    for i in range(per_word):
        part = codes[..., i::per_word].to(torch.int64)
        packed[..., : part.shape[-1]] |= part << (i * bits)
    return _to_int32(packed)


def unpack_aligned(words: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of `pack_aligned`: int32 [..., W] to uint8 [..., length]."""
    _check_capacity(words, aligned_words(length, bits), bits, length)
    per_word = WORD_BITS // bits
    shifts = torch.arange(per_word, dtype=torch.int32, device=words.device) * bits
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :length]


def _to_int32(words: Tensor) -> Tensor:
    """Reinterpret unsigned 32-bit values held in int64 as int32."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _check_capacity(words: Tensor, needed: int, bits: int, length: int) -> None:
    if words.shape[-1] < needed:
        raise ValueError(
            f"{length} codes of {bits} bits need {needed} words of 32 bits, "
            f"but the packed tensor has {words.shape[-1]}"
        )
