"""What is generated: how many prompts, how long, and in which ways."""

from __future__ import annotations

from pydantic import Field

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.long_generation.result import DecodingName
from vllm_quantkit.spec import Frozen


class LongPlan(Frozen):
    """How long continuations are made.

    Attributes:
        prompts: how many; intervals are over them, so at least two.
        prompt_tokens: of each prompt that is a window of text.
        tokens: of each continuation, at most.
        decodings: ways to choose tokens.
        temperature, top_p: of sampling.
        seed: of the first prompt's sampling; each further prompt has the next.
        ends: True lets a model end its text, False ignores the end-of-text token; None lets it
            where the prompts are the user's, not where they are windows of text.
        noise: True measures how soon the base diverges from itself, which costs another greedy
            run of the base.
    """

    prompts: int = Field(default=8, ge=2)
    prompt_tokens: int = Field(default=128, ge=1)
    tokens: int = Field(default=2048, ge=1)
    decodings: tuple[DecodingName, ...] = Field(default=("greedy", "sampled"), min_length=1)
    temperature: float = Field(default=0.6, gt=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    seed: int = Field(default=0, ge=0)
    ends: bool | None = None
    noise: bool = True


class Room(Frozen):
    """What of a plan fits a model.

    Attributes:
        tokens: of each continuation.
        length: that an engine needs, in tokens.
        warnings: a sentence where the plan had to be cut.
    """

    tokens: int
    length: int
    warnings: tuple[str, ...] = ()


SPARE = 1
"""Positions that an engine keeps free: it generates one token behind a text that it scores."""


def fit(plan: LongPlan, longest_prompt: int, max_length: int) -> Room:
    """min(plan.tokens, max_length - longest_prompt - SPARE) tokens for each continuation.

    Args:
        plan: what was asked for.
        longest_prompt: tokens.
        max_length: the most tokens that the model, or its engine, takes.

    Raises:
        ConfigError: the longest prompt leaves no room.
    """
    room = max_length - longest_prompt - SPARE
    if room < 1:
        raise ConfigError(
            f"a prompt of {longest_prompt} tokens leaves no room for a continuation in a model of "
            f"{max_length} positions: give shorter prompts."
        )
    if plan.tokens <= room:
        return Room(tokens=plan.tokens, length=longest_prompt + plan.tokens + SPARE)
    warning = (
        f"Continuations are {room:,} tokens long, not {plan.tokens:,}: the model takes "
        f"{max_length:,} positions, and the longest prompt needs {longest_prompt:,} of them. "
        f"What happens further on was not measured."
    )
    return Room(tokens=room, length=max_length, warnings=(warning,))
