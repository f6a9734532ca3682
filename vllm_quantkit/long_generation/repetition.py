"""How much a text repeats itself, and whether it ends in a loop."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_quantkit.long_generation.result import Loop

GRAM = 4
"""Tokens of an n-gram, as in seq-rep-4 of https://arxiv.org/abs/1908.04319."""

REPEATS, LOOP_TOKENS = 3, 32
"""A loop repeats so often and takes so many tokens, or more: lists and refrains do less."""


def repetition(tokens: Sequence[int], gram: int = GRAM) -> float:
    """1 - distinct n-grams / n-grams, `seq-rep-n` of https://arxiv.org/abs/1908.04319.

    0 for a text shorter than an n-gram.
    """
    grams = [tuple(tokens[start : start + gram]) for start in range(len(tokens) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def find_loop(
    tokens: Sequence[int], prompt: int, repeats: int = REPEATS, shortest: int = LOOP_TOKENS
) -> Loop | None:
    """The longest end of a text that repeats a period at least `repeats` times.

    Args:
        tokens: of a continuation.
        prompt: its place among the prompts.
        repeats: of the period.
        shortest: tokens of a loop.
    """
    borders = border_lengths(tokens[::-1])
    for length in range(len(tokens), shortest - 1, -1):
        period = length - borders[length - 1]
        if period * repeats <= length:
            return Loop(prompt=prompt, position=len(tokens) - length + 1, period=period)
    return None


def border_lengths(tokens: Sequence[int]) -> list[int]:
    """Of every prefix, the length of the longest proper prefix of it that is also its end.

    The prefix function of Knuth, Morris and Pratt (https://doi.org/10.1137/0206024); a prefix of
    length n and border b has the period n - b. Linear in the tokens.
    """
    borders = [0] * len(tokens)
    for place in range(1, len(tokens)):
        border = borders[place - 1]
        while border and tokens[place] != tokens[border]:
            border = borders[border - 1]
        borders[place] = border + (tokens[place] == tokens[border])
    return borders
