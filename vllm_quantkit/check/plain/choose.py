"""The first rule that is about a layer decides."""

from __future__ import annotations

from vllm_quantkit.check.plain.kernels import KERNELS
from vllm_quantkit.check.plain.layer import PlainLayer
from vllm_quantkit.check.plain.rule import Kernel
from vllm_quantkit.check.plain.verdicts import VERDICTS
from vllm_quantkit.check.release import Release
from vllm_quantkit.check.report import Answer
from vllm_quantkit.hardware.device import Device
from vllm_quantkit.spec import Frozen

NO_RULE = "no rule here covers it"


class Choice(Frozen):
    """What vLLM does with a layer.

    Attributes:
        serves: whether it serves it.
        kernel: the family of kernels; empty where it serves none, or nobody knows.
        reason: why.
        source: vLLM's file that decides; empty where no rule did.
    """

    serves: Answer
    kernel: str = ""
    reason: str
    source: str = ""


def choose(layer: PlainLayer, device: Device, release: Release) -> Choice:
    """What a release of vLLM does with a layer on a device that need not be here."""
    for verdict in VERDICTS:
        if verdict.when.applies(layer, device, release):
            return Choice(serves=verdict.answer, reason=verdict.reason, source=verdict.source)
    refusals = []
    for kernel in KERNELS:
        if not kernel.when.applies(layer, device, release):
            continue
        unmet = list(kernel.needs.unmet(layer))
        if not unmet:
            return _picked(kernel)
        refusals.append((kernel, unmet))
    if not refusals:
        return Choice(serves="unknown", reason=NO_RULE)
    told = "; ".join(f"{kernel.family} takes no {' or '.join(u)}" for kernel, u in refusals)
    return Choice(serves="no", reason=told, source=refusals[0][0].source)


def _picked(kernel: Kernel) -> Choice:
    return Choice(serves="yes", kernel=kernel.family, reason=kernel.reason, source=kernel.source)
