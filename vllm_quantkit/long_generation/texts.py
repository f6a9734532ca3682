"""The texts that a model writes after some prompts, greedily and by sampling."""

from __future__ import annotations

from typing import Any, Protocol

from vllm_quantkit.evaluate.intervals import mean_interval
from vllm_quantkit.evaluate.windows import Windows
from vllm_quantkit.long_generation.plan import LongPlan
from vllm_quantkit.long_generation.prompts import PromptSet
from vllm_quantkit.long_generation.repetition import find_loop, repetition
from vllm_quantkit.long_generation.result import DecodingName, Written
from vllm_quantkit.spec import Frozen
from vllm_quantkit.terminal import Tick


class Answering(Protocol):
    """A running engine."""

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """The answer of one of its operations."""


class Texts(Frozen):
    """Continuations, prompt by prompt.

    Attributes:
        rows: token ids of each.
        ended: whether the model ended it by itself; its end-of-text token is then the last.
    """

    rows: tuple[tuple[int, ...], ...]
    ended: tuple[bool, ...]

    def windows(self, prompts: PromptSet, name: str) -> Windows:
        """Prompts with their continuations, as models read them."""
        rows = zip(prompts.rows, self.rows, strict=True)
        return Windows(tuple((*before, *after) for before, after in rows), f"{name} text")

    def described(self) -> Written:
        """How much they repeat themselves, and how long they are."""
        shares = [repetition(row) for row in self.rows]
        loops = (find_loop(row, prompt) for prompt, row in enumerate(self.rows))
        lengths = tuple(map(len, self.rows))
        return Written(
            repetition=mean_interval(shares, [1] * len(shares)).within(0, 1),
            loops=tuple(loop for loop in loops if loop is not None),
            lengths=lengths,
            ended=sum(self.ended),
        )


class ModelTexts(Frozen):
    """What one model wrote.

    Attributes:
        by_decoding: greedy, sampled: what it wrote then.
        again: the same greedy texts in batches of another size; None where that was not asked for.
    """

    by_decoding: dict[DecodingName, Texts]
    again: Texts | None = None


def write_all(
    engine: Answering,
    prompts: PromptSet,
    plan: LongPlan,
    tokens: int,
    *,
    again: bool,
    tick: Tick,
) -> ModelTexts:
    """What a model writes, in every way of the plan.

    Args:
        engine: serves it.
        prompts: to continue.
        plan: the ways.
        tokens: of a continuation, at most.
        again: True writes the greedy texts a second time.
        tick: is called after each way.
    """
    found = {}
    for name in plan.decodings:
        found[name] = _write(engine, prompts, plan, tokens, name)
        tick()
    if not again:
        return ModelTexts(by_decoding=found)
    repeated = _write_again(engine, prompts, plan, tokens)
    tick()
    return ModelTexts(by_decoding=found, again=repeated)


def _write(
    engine: Answering,
    prompts: PromptSet,
    plan: LongPlan,
    tokens: int,
    name: DecodingName,
    batch: int | None = None,
) -> Texts:
    drawn = {"temperature": plan.temperature, "top_p": plan.top_p}
    answer = engine.ask(
        "write_texts",
        prompts=[list(row) for row in prompts.rows],
        tokens=tokens,
        seeds=[plan.seed + place for place in range(len(prompts.rows))],
        ends=prompts.ends,
        batch=batch,
        **(drawn if name == "sampled" else {}),
    )
    return Texts(rows=tuple(map(tuple, answer["tokens"])), ended=tuple(answer["ended"]))


def _write_again(engine: Answering, prompts: PromptSet, plan: LongPlan, tokens: int) -> Texts:
    """Half as many prompts at a time: sums are taken in another order, and nothing else changes."""
    return _write(engine, prompts, plan, tokens, "greedy", batch=(len(prompts.rows) + 1) // 2)
