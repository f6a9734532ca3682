"""From estimates and rules to a choice: excluded, ranked, and answered in reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log, log2

from vllm_quantkit.advise.estimate import Estimate
from vllm_quantkit.advise.rule import Rule, holding
from vllm_quantkit.advise.rules import ANSWERS, EXCLUDES, PREFERS, WARNINGS
from vllm_quantkit.advise.situation import Situation, Trial
from vllm_quantkit.advise.workload import Goal

TIE = 0.9
"""Scores down to this share of the best are equally good, and those down to its square, and so
on: the estimate is no better."""

UNSEEN = 0.01
"""KL divergence, in nats, below which schemes count as equally good: FP8, in which no benchmark
of https://arxiv.org/abs/2411.02355 sees a loss, is below it."""


@dataclass(frozen=True)
class Struck:
    """A candidate that rules exclude.

    Attributes:
        estimate: of the candidate.
        rules: that exclude it.
    """

    estimate: Estimate
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Decision:
    """What is advised, and what was looked at.

    Attributes:
        situation: with all that became known.
        answer: the rule that decided instead of the estimates; None where a candidate was chosen.
        ranked: candidates that may be used, the best first.
        struck: those that may not.
        warnings: rules that add a sentence.
    """

    situation: Situation
    answer: Rule | None
    ranked: tuple[Estimate, ...]
    struck: tuple[Struck, ...]
    warnings: tuple[Rule, ...]

    @property
    def choice(self) -> Estimate | None:
        """The candidate advised; the model as it is where that is the answer."""
        if self.answer is None:
            return self.ranked[0]
        plain = (one for one in self.ranked if one.candidate.plain)
        return next(plain, None) if self.answer.name in KEEPS_PLAIN else None

    @property
    def runner_up(self) -> Estimate | None:
        """The best with other bits for weights or activations."""
        chosen = self.choice
        if chosen is None:
            return None
        bits = _bits(chosen)
        others = (one for one in self.ranked if _bits(one) != bits)
        return next(others, None)

    def preferred_for(self, estimate: Estimate) -> tuple[Rule, ...]:
        """Rules that prefer a candidate."""
        return tuple(holding(PREFERS, self.situation, trial_of(estimate)))


KEEPS_PLAIN = ("best-quality", "fixed-costs", "compute-bound", "little-to-gain")
"""Answers that are: do not quantise."""


def early_answer(situation: Situation) -> Rule | None:
    """An answer that no estimate would change."""
    return next(holding(ANSWERS, situation), None)


def decide(situation: Situation, estimates: Sequence[Estimate]) -> Decision:
    """Excludes, ranks, and asks the rules again with what came out."""
    situation = _with_room(situation, estimates)
    struck = tuple(Struck(one, rules) for one in estimates if (rules := _struck(situation, one)))
    gone = {id(one.estimate) for one in struck}
    ranked = rank(situation, [one for one in estimates if id(one) not in gone])
    situation = _with_gain(situation, estimates, ranked)
    answer = early_answer(situation)
    decision = Decision(situation, answer, ranked, struck, ())
    situation = _with_choice(situation, decision.choice)
    return Decision(situation, answer, ranked, struck, tuple(holding(WARNINGS, situation)))


def rank(situation: Situation, estimates: Sequence[Estimate]) -> tuple[Estimate, ...]:
    """The best for the goal first; of equally good ones the one closest to 16 bits.

    Closeness is compared by the worst that is known of a scheme, in steps of a factor of two from
    `UNSEEN` on; within a step what the rules prefer comes first, and then the score.
    """
    if not estimates:
        return ()
    if situation.goal == "quality":
        return tuple(sorted(estimates, key=_by_quality))
    best = max(score(situation.goal, one) for one in estimates)
    return tuple(sorted(estimates, key=lambda one: _place(situation, one, best)))


def score(goal: Goal, estimate: Estimate) -> float:
    """What the goal makes as large as possible."""
    if goal == "throughput":
        return estimate.tokens_per_second
    if goal == "latency":
        return 1 / estimate.answer_seconds
    if goal == "memory":
        return 1 / estimate.needed_bytes
    return -estimate.quality.likely


def trial_of(estimate: Estimate) -> Trial:
    """The estimate as rules see it."""
    return Trial(candidate=estimate.candidate, fits=estimate.sequences, quality=estimate.quality)


def _bits(estimate: Estimate) -> tuple[int, int]:
    scheme = estimate.candidate.scheme
    return scheme.weight_bits, scheme.activation_bits


def _by_quality(estimate: Estimate) -> tuple[float, float]:
    return (estimate.quality.likely, -score("throughput", estimate))


def _place(situation: Situation, one: Estimate, best: float) -> tuple[int, float, int, float]:
    value = score(situation.goal, one)
    band = floor(log(best / value) / log(1 / TIE))
    preferred = sum(1 for _ in holding(PREFERS, situation, trial_of(one)))
    return (band, _distance(one.quality.high), -preferred, -value)


def _distance(divergence: float) -> float:
    """0 up to `UNSEEN`, then one more for each doubling."""
    return 0 if divergence <= UNSEEN else ceil(log2(divergence / UNSEEN))


def _struck(situation: Situation, estimate: Estimate) -> tuple[Rule, ...]:
    return tuple(holding(EXCLUDES, situation, trial_of(estimate)))


def _with_room(situation: Situation, estimates: Sequence[Estimate]) -> Situation:
    plain = next((one for one in estimates if one.candidate.plain), None)
    return situation.model_copy(
        update={
            "fits_plain": plain is not None and plain.sequences >= situation.batch,
            "limit_plain": None if plain is None else plain.limit,
        }
    )


def _with_gain(
    situation: Situation, estimates: Sequence[Estimate], ranked: Sequence[Estimate]
) -> Situation:
    plain = next((one for one in estimates if one.candidate.plain), None)
    gain = None
    if plain is not None and plain.sequences >= 1 and ranked and situation.goal != "quality":
        gain = max(score(situation.goal, one) for one in ranked) / score(situation.goal, plain)
    return situation.model_copy(update={"fits_any": bool(ranked), "gain": gain})


def _with_choice(situation: Situation, choice: Estimate | None) -> Situation:
    if choice is None:
        return situation
    return situation.model_copy(
        update={
            "chosen": choice.candidate.scheme.name,
            "chosen_cache": choice.candidate.cache,
            "chosen_bits": choice.candidate.scheme.weight_bits,
            "chosen_sequences": choice.sequences,
            "chosen_quality": choice.quality,
        }
    )
