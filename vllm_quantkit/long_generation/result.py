"""What long generation showed: frozen types, from one position's figure to the whole answer.

Positions count the tokens of a continuation from 1, the prompt not among them.
"""

from __future__ import annotations

from statistics import median
from typing import Literal

from pydantic import Field

from vllm_quantkit.evaluate.intervals import Interval
from vllm_quantkit.spec import Frozen

DecodingName = Literal["greedy", "sampled"]


class SurvivalStep(Frozen):
    """From this position on, `share` of the continuations are still the same.

    Attributes:
        position: of a token at which some prompt's continuations part.
        share: Kaplan and Meier's estimate of the prompts that are the same behind it.
    """

    position: int = Field(ge=1)
    share: float = Field(ge=0, le=1)


class Divergence(Frozen):
    """Where two continuations of the same prompts first differ.

    Attributes:
        positions: of the first token that differs, prompt by prompt; None where none does.
        lengths: tokens that could be compared, prompt by prompt.
        median: the position at which half of the prompts have diverged, by Kaplan and Meier; None
            where fewer do.
        never: share of prompts whose continuations are the same to the end; Wilson's interval.
        survival: the curve of what is still the same; 1 before its first step.
    """

    positions: tuple[int | None, ...]
    lengths: tuple[int, ...]
    median: int | None
    never: Interval
    survival: tuple[SurvivalStep, ...]


class CurveBin(Frozen):
    """Mean of KL(base || model) over a range of positions of the base's text.

    Attributes:
        first, last: positions, both included.
        divergence: nats for each token; the interval is over prompts.
        prompts: whose text reaches the range.
    """

    first: int = Field(ge=1)
    last: int = Field(ge=1)
    divergence: Interval
    prompts: int = Field(ge=1)


class Compounding(Frozen):
    """Whether the error grows along a text: 1 and 0 where it does not.

    Attributes:
        early, late: mean KL(base || model) over the first and the last quarter of each text, nats.
        ratio: late / early; its interval is over prompts. NaN where early is 0.
        slope: of the least squares line through a text's KL, nats per 1,000 tokens.
    """

    early: float
    late: float
    ratio: Interval
    slope: Interval


class Loop(Frozen):
    """A continuation whose rest repeats itself, word for word, to the end.

    Attributes:
        prompt: its place among the prompts, from 0.
        position: of the first token of the loop.
        period: tokens until it repeats.
    """

    prompt: int = Field(ge=0)
    position: int = Field(ge=1)
    period: int = Field(ge=1)


class Written(Frozen):
    """What one model wrote.

    Attributes:
        repetition: share of 4-grams that occurred before in the same continuation; mean over
            prompts.
        loops: continuations that ended in one.
        lengths: tokens of each continuation, its end-of-text token included.
        ended: continuations that the model ended by itself.
    """

    repetition: Interval
    loops: tuple[Loop, ...] = ()
    lengths: tuple[int, ...]
    ended: int = Field(ge=0)

    @property
    def median_length(self) -> float:
        """Of `lengths`."""
        return float(median(self.lengths))


class Decoding(Frozen):
    """The same prompts, continued by both models in one way.

    Attributes:
        name: greedy, or sampled with a seed of its own for each prompt, the same for both models.
        temperature, top_p: of the sampling; 0 and 1 where it is greedy.
        base, model: what each wrote.
        divergence: of the two.
        noise: of the base from itself, in batches of another size; None where it was not measured.
        curve: KL(base || model) along the base's text, which both models read.
        compounding: of that curve; None where there is no curve.
        parting_probability: that the base gave its own token where greedy texts part, median over
            those that do; None where none does, and of sampled texts.
    """

    name: DecodingName
    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    base: Written
    model: Written
    divergence: Divergence
    noise: Divergence | None = None
    curve: tuple[CurveBin, ...] = ()
    compounding: Compounding | None = None
    parting_probability: float | None = None


class LongGeneration(Frozen):
    """Long continuations of a quantised model beside those of its 16-bit base.

    Attributes:
        prompts: how many.
        tokens: that a continuation has at most.
        source: of the prompts.
        fingerprint: SHA-256 over the prompts' tokens.
        seed: of the first prompt; each further one has the next.
        ends: True where a model could end its text; False where the end-of-text token was ignored.
        backend: such as `vllm 0.32.0`.
        decodings: greedy first.
        warnings: a sentence each.
    """

    prompts: int = Field(ge=2)
    tokens: int = Field(ge=1)
    source: str
    fingerprint: str
    seed: int
    ends: bool
    backend: str
    decodings: tuple[Decoding, ...]
    warnings: tuple[str, ...] = ()
