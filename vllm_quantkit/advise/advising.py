"""The whole question: from a model, a device and a workload to an answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_quantkit.advise import commands, words
from vllm_quantkit.advise.answer import Answer, Excluded, Saying, Verdict
from vllm_quantkit.advise.candidates import candidates
from vllm_quantkit.advise.commands import Command
from vllm_quantkit.advise.decision import KEEPS_PLAIN, Decision, decide, early_answer, trial_of
from vllm_quantkit.advise.estimate import Estimate, Estimator, Unserved, estimate_all
from vllm_quantkit.advise.measured import Measured
from vllm_quantkit.advise.roofline import LinearClock, Rates, RooflineClock, rates_of
from vllm_quantkit.advise.rule import Rule, holding
from vllm_quantkit.advise.rules import WARNINGS as WARNING_RULES
from vllm_quantkit.advise.situation import Situation, Trial, situation_of
from vllm_quantkit.advise.workload import Workload
from vllm_quantkit.footprint import Model
from vllm_quantkit.hardware import Device


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        model: in 16 bits, or a checkpoint that is quantised already.
        device: each tensor-parallel rank has one.
        workload: what it is for.
        measured: checkpoints whose quality is known.
        clock: times of linear layers measured here; None for the roofline.
    """

    model: Model
    device: Device
    workload: Workload
    measured: tuple[Measured, ...] = ()
    clock: LinearClock | None = None


def advise(question: Question) -> Answer:
    """The answer.

    Raises:
        QuantkitError: the model's files do not fit together, or heads do not divide by `tp`.
    """
    facts, workload = question.model.facts, question.workload
    situation = situation_of(facts, question.device, workload, question.measured)
    if (rule := early_answer(situation)) is not None:
        return _answered(question, situation, rule)
    rates = rates_of(question.device)
    clock = question.clock or RooflineClock(rates)
    estimator = Estimator(
        question.model, question.device, workload, rates, clock, question.measured
    )
    served, unserved = estimate_all(estimator, candidates())
    return _decided(question, decide(situation, served), rates, served, unserved)


def _answered(question: Question, situation: Situation, rule: Rule) -> Answer:
    """An answer that needs no estimate."""
    return Answer(
        model=situation.model,
        parameters=situation.parameters,
        device=question.device,
        workload=question.workload,
        verdict="something else",
        headline=rule.say(situation),
        rule=rule.name,
        source=rule.source,
        commands=_instead(question, rule),
        warnings=_sayings(holding(WARNING_RULES, situation), situation),
    )


def _instead(question: Question, rule: Rule) -> tuple[Command, ...]:
    """What to run where vllm-quantkit's quantisation is not the answer."""
    model, workload = question.model.facts.model, question.workload
    if rule.name == "apple-silicon":
        return commands.llama_cpp(model, workload)
    if rule.name == "quantised-already":
        return (commands.serve_as_it_is(model, workload), commands.check_quantized(model))
    if rule.name == "mixture-of-experts" and question.device.multiplies_fp8:
        return (commands.own_fp8(model, workload),)
    return ()


def _decided(
    question: Question,
    decision: Decision,
    rates: Rates,
    served: tuple[Estimate, ...],
    unserved: tuple[Unserved, ...],
) -> Answer:
    situation, workload, chosen = decision.situation, question.workload, decision.choice
    plain = next((one for one in served if one.candidate.plain), None)
    other = decision.runner_up
    return Answer(
        model=situation.model,
        parameters=situation.parameters,
        device=question.device,
        workload=workload,
        verdict=_verdict(decision),
        headline=_headline(decision, question),
        rule=None if decision.answer is None else decision.answer.name,
        source=None if decision.answer is None else decision.answer.source,
        choice=chosen,
        reasons=()
        if chosen is None
        else tuple(words.reasons_of(decision, chosen, plain, workload)),
        runner_up=other,
        why_not=""
        if chosen is None or other is None
        else words.why_not(decision, chosen, other, workload.goal),
        commands=()
        if chosen is None
        else commands.commands_for(situation.model, chosen.candidate, workload),
        warnings=_sayings(decision.warnings, situation),
        estimates=decision.ranked,
        excluded=_excluded(decision),
        unserved=unserved,
        figures=words.figures_of(question.device, rates, question.clock is not None),
        sources=_sources(decision),
    )


def _verdict(decision: Decision) -> Verdict:
    if decision.answer is not None:
        return "keep 16 bits" if decision.answer.name in KEEPS_PLAIN else "something else"
    return "keep 16 bits" if decision.ranked[0].candidate.plain else "quantise"


def _headline(decision: Decision, question: Question) -> str:
    if decision.answer is not None:
        return decision.answer.say(decision.situation)
    best, workload = decision.ranked[0], question.workload
    devices = (
        question.device.name if workload.tp == 1 else f"{workload.tp} x {question.device.name}"
    )
    if best.candidate.plain:
        return f"Keep 16 bits: nothing that may be used is better for {workload.goal} on {devices}."
    return (
        f"Use {best.candidate.words} for {workload.goal} on {devices}, "
        f"{workload.batch} sequences of {workload.context} tokens."
    )


def _excluded(decision: Decision) -> tuple[Excluded, ...]:
    return tuple(
        Excluded(
            candidate=struck.estimate.candidate.name,
            reasons=_sayings(
                struck.rules,
                decision.situation,
                trial_of(struck.estimate),
            ),
        )
        for struck in decision.struck
    )


def _sayings(
    rules: Iterable[Rule], situation: Situation, trial: Trial | None = None
) -> tuple[Saying, ...]:
    return tuple(
        Saying(rule=rule.name, sentence=rule.say(situation, trial), source=rule.source)
        for rule in rules
    )


def _sources(decision: Decision) -> tuple[str, ...]:
    """Of the quality of the choice and of what came second."""
    both = (decision.choice, decision.runner_up)
    found = (source for one in both if one is not None for source in one.quality.sources)
    return tuple(dict.fromkeys(found))
