"""What an engine is asked, and what its answers mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from vllm_quantkit.bench.plan import SHORT_PROMPT, BenchPlan
from vllm_quantkit.bench.quantities import Key
from vllm_quantkit.bench.rounds import Measure
from vllm_quantkit.engine.client import EngineError

ATTEMPTS = 3
"""To see a long prompt take longer than a short one."""


class Asked(Protocol):
    """An engine, as far as it is asked here."""

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """The answer of one of the worker's operations."""


@dataclass(frozen=True)
class Decode:
    """Sequences that decode together."""

    batch: int
    tokens: int
    context: int = SHORT_PROMPT

    @property
    def rate(self) -> Key:
        """Of the tokens/s."""
        return Key("decode", self.batch)

    def ask(self, subject: Asked) -> dict[Key, float]:
        """Tokens/s of all, and the median and 99th percentile of the gaps between one's tokens."""
        answer = subject.ask("decode", batch=self.batch, tokens=self.tokens, context=self.context)
        return {
            self.rate: answer["tokens_per_second"],
            Key("gap", self.batch): answer["gap"],
            Key("gap_tail", self.batch): answer["gap_tail"],
        }


@dataclass(frozen=True)
class Prefill:
    """A prompt that no cache holds, with nothing else running."""

    tokens: int

    @property
    def rate(self) -> Key:
        """Of the tokens/s."""
        return Key("prefill", self.tokens)

    def ask(self, subject: Asked) -> dict[Key, float]:
        """Seconds until its first token, and tokens/s by the difference from a short prompt.

        The difference leaves request handling and the decoded token out.

        Raises:
            EngineError: no difference could be seen.
        """
        for _ in range(ATTEMPTS):
            answer = subject.ask("prefill", tokens=self.tokens)
            if answer["full"] > answer["short"]:
                rate = (self.tokens - SHORT_PROMPT) / (answer["full"] - answer["short"])
                return {
                    Key("first", self.tokens): answer["full"],
                    self.rate: rate,
                }
        raise EngineError(
            f"in {ATTEMPTS} attempts, a prompt of {self.tokens} tokens took no longer than one of "
            f"{SHORT_PROMPT}: the machine is too noisy for so short a prompt, try a longer one."
        )


@dataclass(frozen=True)
class FirstTokenUnderLoad:
    """A prompt that comes while others decode."""

    tokens: int
    load: int

    def ask(self, subject: Asked) -> dict[Key, float]:
        """Seconds until its first token."""
        answer = subject.ask("first_token_under_load", tokens=self.tokens, load=self.load)
        return {Key("first_loaded", self.tokens): answer["seconds"]}


@dataclass(frozen=True)
class Mixed:
    """Requests of different lengths that come all at once."""

    requests: int
    prompt: int
    tokens: int

    def ask(self, subject: Asked) -> dict[Key, float]:
        """Tokens/s of prompts and answers, from the first request to the last token."""
        answer = subject.ask(
            "mixed", requests=self.requests, prompt=self.prompt, tokens=self.tokens
        )
        return {Key("mixed", self.requests): answer["tokens_per_second"]}


def measures(plan: BenchPlan) -> list[Measure[Asked]]:
    """What each round of `plan` asks."""
    asked: list[Measure[Asked]] = [
        Decode(batch, plan.tokens, plan.context) for batch in plan.batches
    ]
    asked += [Prefill(tokens) for tokens in plan.prompts]
    if plan.load:
        asked += [FirstTokenUnderLoad(tokens, plan.load) for tokens in plan.prompts]
    if plan.mixed:
        asked.append(Mixed(plan.mixed, plan.longest_prompt, 2 * plan.tokens))
    return asked
