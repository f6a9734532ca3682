"""Two models' texts, and what one says of the other's, as figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from vllm_quantkit.evaluate.window_scores import Floats, WindowScores
from vllm_quantkit.long_generation.base_run import BaseRun
from vllm_quantkit.long_generation.curve import compounding, kl_curve
from vllm_quantkit.long_generation.divergence import diverge
from vllm_quantkit.long_generation.result import Decoding, DecodingName, Divergence
from vllm_quantkit.long_generation.texts import Texts


def compare_decoding(
    name: DecodingName, base: BaseRun, model: Texts, scores: Sequence[WindowScores]
) -> Decoding:
    """A quantised model's texts beside the base's, and the divergence along the base's.

    Args:
        name: how tokens were chosen.
        base: what the base wrote.
        model: what the model wrote after the same prompts.
        scores: the model's figures of the base's prompts and texts.
    """
    greedy, written = name == "greedy", base.texts.by_decoding[name]
    again = base.texts.again if greedy else None
    divergence = diverge(written.rows, model.rows)
    starts = [len(prompt) for prompt in base.prompts.rows]
    curves = [_behind(window.divergences, n) for window, n in zip(scores, starts, strict=True)]
    losses = [_behind(window.base_losses, n) for window, n in zip(scores, starts, strict=True)]
    return Decoding(
        name=name,
        temperature=0.0 if greedy else base.plan.temperature,
        top_p=1.0 if greedy else base.plan.top_p,
        base=written.described(),
        model=model.described(),
        divergence=divergence,
        noise=None if again is None else diverge(written.rows, again.rows),
        curve=kl_curve(curves),
        compounding=compounding(curves),
        parting_probability=_parting_probability(divergence, losses) if greedy else None,
    )


def _behind(values: Floats | None, prompt_tokens: int) -> Floats:
    """The figures of a continuation's tokens: a window's first figure is of its second token."""
    assert values is not None, "the window was compared with the base"
    return values[prompt_tokens - 1 :]


def _parting_probability(divergence: Divergence, losses: Sequence[Floats]) -> float | None:
    """Median over texts that part of the base's probability of its own token there."""
    parted = zip(divergence.positions, losses, strict=True)
    found = [math.exp(-loss[at - 1]) for at, loss in parted if at is not None]
    return median(found) if found else None
