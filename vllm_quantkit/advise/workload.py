"""What a model is to be served for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vllm_quantkit.spec import Frozen

Goal = Literal["throughput", "latency", "memory", "quality"]
"""What is made best: tokens of all sequences a second, the time of one answer, memory, or
closeness to the 16-bit model."""

Training = Literal["none", "lora", "full"]
"""Whether the quantised model is to be trained further, and how."""


class Workload(Frozen):
    """Sequences at a time, their length, and what matters.

    Attributes:
        context: tokens of a sequence, prompt and answer.
        batch: sequences at a time.
        output: tokens of an answer; None for a quarter of the context.
        goal: what is made best.
        max_kl: largest mean KL divergence from the 16-bit model, in nats; None for any.
        tp: tensor-parallel size.
        training: what is to be done with the quantised model besides.
    """

    context: int = Field(gt=1)
    batch: int = Field(gt=0)
    output: int | None = Field(default=None, gt=0)
    goal: Goal = "throughput"
    max_kl: float | None = Field(default=None, ge=0)
    tp: int = Field(default=1, gt=0)
    training: Training = "none"

    @property
    def answer_tokens(self) -> int:
        """Tokens of an answer, at least 1 and fewer than the context."""
        return max(1, min(self.output or self.context // 4, self.context - 1))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt."""
        return self.context - self.answer_tokens
