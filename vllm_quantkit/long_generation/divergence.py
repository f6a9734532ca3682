"""Where two continuations of the same prompts part, and how many are still the same when."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_quantkit.long_generation.intervals import share
from vllm_quantkit.long_generation.result import Divergence, SurvivalStep

Tokens = Sequence[int]


def diverge(first: Sequence[Tokens], second: Sequence[Tokens]) -> Divergence:
    """The first position at which each pair differs, and what that says of all of them.

    A pair in which one ends where the other goes on differs at the next position: the
    end-of-text token is part of a continuation, so this is met only where one was cut off.

    Args:
        first: continuations, prompt by prompt.
        second: of the same prompts.

    Raises:
        ValueError: there are not as many of one as of the other.
    """
    pairs = list(zip(first, second, strict=True))
    positions = tuple(first_difference(a, b) for a, b in pairs)
    lengths = tuple(min(len(a), len(b)) for a, b in pairs)
    survival = survive(positions, lengths)
    return Divergence(
        positions=positions,
        lengths=lengths,
        median=next((step.position for step in survival if step.share <= 0.5), None),
        never=share(positions.count(None), len(positions)),
        survival=survival,
    )


def first_difference(first: Tokens, second: Tokens) -> int | None:
    """min {t >= 1: first[t] != second[t]} over the positions that both have; None for no such."""
    pairs = enumerate(zip(first, second, strict=False), start=1)
    return next((position for position, (a, b) in pairs if a != b), None)


def survive(positions: Sequence[int | None], lengths: Sequence[int]) -> tuple[SurvivalStep, ...]:
    """S(t) = prod over divergence positions u <= t of (1 - diverged at u / still compared at u).

    The estimate of Kaplan and Meier (https://doi.org/10.1080/01621459.1958.10501452): a pair
    that is the same to its end counts as long as it lasts, and no longer.

    Args:
        positions: of the first difference, pair by pair; None where there is none.
        lengths: tokens compared, pair by pair.
    """
    until = [length if at is None else at for at, length in zip(positions, lengths, strict=True)]
    steps, same = list[SurvivalStep](), 1.0
    for position in sorted({at for at in positions if at is not None}):
        at_risk = sum(end >= position for end in until)
        same *= 1 - positions.count(position) / at_risk
        steps.append(SurvivalStep(position=position, share=same))
    return tuple(steps)
