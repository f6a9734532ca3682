"""The answer as data, which `--json` prints, and as sentences."""

from __future__ import annotations

from typing import Literal

from vllm_quantkit.advise.commands import Command
from vllm_quantkit.advise.estimate import Estimate, Unserved
from vllm_quantkit.advise.workload import Workload
from vllm_quantkit.hardware import Device
from vllm_quantkit.spec import Frozen

Verdict = Literal["quantise", "keep 16 bits", "something else"]


class Saying(Frozen):
    """A sentence that a rule adds.

    Attributes:
        rule: its name.
        sentence: what it says here.
        source: URL, or result file of this project.
    """

    rule: str
    sentence: str
    source: str


class Excluded(Frozen):
    """A candidate that may not be used.

    Attributes:
        candidate: name.
        reasons: of the rules that exclude it.
    """

    candidate: str
    reasons: tuple[Saying, ...]


class Answer(Frozen):
    """What `quantkit advise` found; its fields are those of `--json`.

    Attributes:
        model: folder or hub name.
        parameters: of the model.
        device: with the figures that were used; `measured` names those of this machine.
        workload: what was asked for.
        verdict: quantise, keep 16 bits, or do something else, such as use llama.cpp.
        headline: the answer in a sentence or two.
        rule: that decided it; None where the estimates did.
        source: of that rule.
        choice: the candidate advised; None where it is something else.
        reasons: for the choice, with figures.
        runner_up: the best candidate with other weights; None where there is none.
        why_not: what speaks against it.
        commands: to run, in order.
        warnings: what to know before trusting it.
        estimates: every candidate that may be used, the best first.
        excluded: those that may not.
        unserved: those that vllm-quantkit refuses for this model.
        figures: how each kind of figure is known: measured, from a data sheet, or assumed.
        sources: of the figures about quality.
    """

    model: str
    parameters: int
    device: Device
    workload: Workload
    verdict: Verdict
    headline: str
    rule: str | None = None
    source: str | None = None
    choice: Estimate | None = None
    reasons: tuple[str, ...] = ()
    runner_up: Estimate | None = None
    why_not: str = ""
    commands: tuple[Command, ...] = ()
    warnings: tuple[Saying, ...] = ()
    estimates: tuple[Estimate, ...] = ()
    excluded: tuple[Excluded, ...] = ()
    unserved: tuple[Unserved, ...] = ()
    figures: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
