"""What is measured, how often and under which conditions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from vllm_quantkit.spec import Frozen

Count = Annotated[int, Field(ge=1)]

SHORT_PROMPT = 16
"""Tokens of prompts that cost next to nothing."""

LEAST_PROMPT = 4 * SHORT_PROMPT
"""Of a prefill, so that it is longer than the short prompt it is compared with."""

WARM_UP_TOKENS = 8
"""That each sequence of a batch decodes before the clock starts."""


class BenchPlan(Frozen):
    """What every engine is asked in every round.

    Attributes:
        batches: sequences that decode together.
        tokens: that each of them decodes.
        context: tokens of the prompts behind which they decode.
        prompts: tokens of prompts that are prefilled alone.
        load: sequences that decode while another request waits for its first token; 0 leaves
            that out.
        mixed: requests, of different lengths, of a batch whose throughput is measured; 0 leaves
            that out.
        rounds: how often everything is asked.
    """

    batches: tuple[Count, ...] = (1, 8, 32)
    tokens: Annotated[int, Field(ge=2)] = 32
    context: Annotated[int, Field(ge=SHORT_PROMPT)] = SHORT_PROMPT
    prompts: tuple[Annotated[int, Field(ge=LEAST_PROMPT)], ...] = (448,)
    load: Annotated[int, Field(ge=0)] = 8
    mixed: Annotated[int, Field(ge=0)] = 32
    rounds: Count = 6

    @model_validator(mode="after")
    def _measures_something(self) -> BenchPlan:
        if not self.batches and not self.prompts:
            raise ValueError("neither batches nor prompts are given")
        return self

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max((LEAST_PROMPT, *self.prompts))

    @property
    def batch_tokens(self) -> int:
        """That the cache has to hold for the largest batch."""
        return self.most_sequences * (self.context + WARM_UP_TOKENS + self.tokens)

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer: in the mixed batch, where the mean is `tokens`."""
        return WARM_UP_TOKENS + 2 * self.tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.longest_prompt, self.context) + self.longest_answer

    @property
    def most_sequences(self) -> int:
        """That run at the same time."""
        return max((1, *self.batches, self.load + 1))
