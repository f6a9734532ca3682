"""What the command `quantkit advise` does."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_quantkit.advise.advising import Question, advise
from vllm_quantkit.advise.answer import Answer
from vllm_quantkit.advise.candidates import SCHEMES
from vllm_quantkit.advise.measured import read_measured
from vllm_quantkit.advise.request import AdviseRequest
from vllm_quantkit.advise.roofline import LinearClock, rates_of
from vllm_quantkit.advise.words import table_of
from vllm_quantkit.footprint import Model, layer_groups, read_model
from vllm_quantkit.hardware import Device, find_device
from vllm_quantkit.terminal import Terminal

PREFILL_ROWS = 512
"""Rows from which the time of a layer grows in proportion to them."""

HERE = ("this", "cpu")
"""Devices that are this machine's whatever they are called."""


def run_advise(request: AdviseRequest, terminal: Terminal) -> int:
    """Prints the answer, or the mixture that `--search` found; returns the exit status.

    Raises:
        QuantkitError: no such model or device, a report that cannot be read, or a workload that
            the model cannot have.
    """
    model = read_model(request.model)
    device, here = device_of(request, terminal)
    if request.search is not None:
        from vllm_quantkit.advise.search.running import run_search

        clock = _clock(request, model, device, terminal) if here and _by_speed(request) else None
        return run_search(request, model, device, terminal, clock)
    measured = read_measured(request.model, model.facts, request.measured)
    clock = _clock(request, model, device, terminal) if here else None
    answer = advise(Question(model, device, request.workload, measured, clock))
    tell(answer, terminal)
    return 0


def device_of(request: AdviseRequest, terminal: Terminal) -> tuple[Device, bool]:
    """The device, measured where it is in this machine, and whether it is and was.

    Raises:
        ConfigError: there is no such device.
    """
    device = find_device(request.gpu)
    if not request.measure:
        return device, False
    from vllm_quantkit.hardware.measure import measure

    if request.gpu is None or request.gpu.lower() in HERE:
        terminal.note("measuring this machine's memory and products ...")
    device = measure(device)
    return device, bool(device.measured)


def tell(answer: Answer, terminal: Terminal) -> None:
    """The answer in sentences, or as JSON."""
    terminal.line(answer.headline)
    for title, lines in _sections(answer):
        if lines:
            terminal.line()
            terminal.line(f"{title}:")
            for line in lines:
                terminal.line(f"  {line}")
    if answer.estimates:
        terminal.line()
        terminal.table(table_of(answer.estimates, answer.device))
    for saying in answer.warnings:
        terminal.warn(saying.sentence)
    terminal.result(answer)


def _sections(answer: Answer) -> Iterator[tuple[str, list[str]]]:
    yield "Why", list(answer.reasons)
    yield "Runner-up", [answer.why_not] if answer.why_not else []
    yield "Commands", [f"{one.line}   # {one.purpose}" for one in answer.commands]
    yield "Not considered", list(_left_out(answer))
    yield "How the figures are known", list(answer.figures)
    sources = [answer.source] if answer.source else []
    yield "Sources", list(dict.fromkeys([*sources, *answer.sources]))


def _left_out(answer: Answer) -> Iterator[str]:
    """Candidates that are out for the same reason, together."""
    names: dict[str, list[str]] = {}
    for one in answer.excluded:
        reason = "; ".join(saying.sentence for saying in one.reasons)
        names.setdefault(reason, []).append(one.candidate)
    for other in answer.unserved:
        names.setdefault(other.reason, []).append(other.candidate.name)
    return (f"{', '.join(group)}: {reason}" for reason, group in names.items())


def _by_speed(request: AdviseRequest) -> bool:
    return request.search is not None and request.search.min_speedup is not None


def _clock(
    request: AdviseRequest, model: Model, device: Device, terminal: Terminal
) -> LinearClock | None:
    """Times of this machine's kernels, for the largest kind of layer of the model.

    Nothing is timed for a model that gets another answer anyway.
    """
    if model.facts.experts or model.facts.quantization_config or device.kind == "apple":
        return None
    from vllm_quantkit.advise.kernels_here import MeasuredClock, measure_kernels

    groups = [group for group in layer_groups(model, None) if not group.head]
    shape = max(
        (group.shape for group in groups), key=lambda one: one.out_features * one.in_features
    )
    rows = (1, request.workload.batch, PREFILL_ROWS)
    with terminal.phase("timing a layer of each scheme", 1) as tick:
        speeds = measure_kernels(shape, rows, SCHEMES, "cuda" if device.kind == "cuda" else "cpu")
        tick()
    return MeasuredClock(speeds, rates_of(device))
