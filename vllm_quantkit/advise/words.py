"""Figures and reasons in words."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_quantkit.advise import roofline
from vllm_quantkit.advise.decision import Decision, score
from vllm_quantkit.advise.estimate import Estimate
from vllm_quantkit.advise.quality import QualityRange
from vllm_quantkit.advise.roofline import Rates
from vllm_quantkit.advise.workload import Goal, Workload
from vllm_quantkit.hardware import Device
from vllm_quantkit.terminal import Table

GIB = 1 << 30
MIB = 1 << 20

KNOWN = {
    "measured": "measured",
    "partly measured": "weights measured, the cache's share published of others",
    "published": "published of others, not of this model",
}

ROWS = 8
"""Of the table of candidates."""

JUDGED = {
    "throughput": "the throughput of the choice",
    "latency": "the speed of its answers",
    "memory": "what fits in the same memory",
}

LIMITS = {
    "memory bandwidth": "most of a decode step goes to reading weights and cache",
    "arithmetic": "most of a decode step goes to products",
    "fixed costs": "most of a decode step goes to launches and scheduling",
}


def reasons_of(
    decision: Decision, chosen: Estimate, plain: Estimate | None, workload: Workload
) -> Iterator[str]:
    """Why the choice was made, in figures."""
    yield _memory(chosen, plain, workload)
    yield _speed(chosen, plain, workload)
    yield LIMITS[chosen.limit] + "."
    if not chosen.candidate.plain:
        yield f"quality: {quality_words(chosen.quality)}."
    for rule in decision.preferred_for(chosen):
        yield rule.say(decision.situation) + "."


def why_not(decision: Decision, chosen: Estimate, other: Estimate, goal: Goal) -> str:
    """What speaks against another candidate."""
    judged: Goal = "throughput" if goal == "quality" else goal
    share = score(judged, other) / score(judged, chosen)
    parts = [f"{share:.2f}x {JUDGED[judged]}"]
    if other.quality.likely > chosen.quality.likely:
        parts.append(f"a larger error ({quality_words(other.quality)})")
    elif 0.9 <= share <= 1.1:
        parts.append("equally good within the error of this estimate")
    if other.sequences < chosen.sequences:
        parts.append(f"room for {other.sequences:.1f} sequences instead of {chosen.sequences:.1f}")
    return f"{other.candidate.words}: {', '.join(parts)}."


def size(nbytes: int) -> str:
    """Bytes with a unit in which they are not all zeros."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / MIB:.2f} MiB"


def quality_words(quality: QualityRange) -> str:
    """The range, and where it comes from."""
    if quality.basis == "exact":
        return "as the 16-bit model"
    middle = f"{quality.low:.4f}"
    if quality.high > quality.low:
        middle += f" to {quality.high:.4f}"
    known = KNOWN[quality.basis]
    return f"KL divergence {middle} nats, {known} ({quality.words})"


def figures_of(device: Device, rates: Rates, kernels_measured: bool) -> tuple[str, ...]:
    """How each kind of figure is known."""
    bandwidth = f"{rates.bandwidth / 1e9:.0f} GB/s"
    lines = [
        f"memory bandwidth {bandwidth}: " + _known("bandwidth", device, roofline.MEMORY_EFFICIENCY)
    ]
    for number, peak in rates.peaks.items():
        known = _known(number, device, roofline.COMPUTE_EFFICIENCY)
        lines.append(f"{number} products {peak / 1e12:.2f} TFLOP/s: {known}")
    lines.append(
        f"fixed costs {rates.step_seconds * 1e3:.1f} ms a step and "
        f"{rates.layer_seconds * 1e6:.0f} us a layer: assumed"
    )
    if kernels_measured:
        lines.append("linear layers: one of each scheme timed on this machine")
    return tuple(lines)


def table_of(estimates: tuple[Estimate, ...], device: Device) -> Table:
    """The best candidates side by side, and the model as it is."""
    plain = tuple(one for one in estimates[ROWS:] if one.candidate.plain)
    left = len(estimates) - len(shown := estimates[:ROWS] + plain)
    rows = tuple(
        (
            one.candidate.name,
            f"{one.weight_bytes / GIB:.2f}",
            f"{one.kv_bytes_per_token / 1024:.1f}",
            f"{one.sequences:.1f}",
            f"{one.tokens_per_second:,.0f}",
            f"{one.token_seconds * 1e3:.2f}",
            f"{one.first_token_seconds * 1e3:,.0f}",
            _range(one.quality),
        )
        for one in shown
    )
    columns = (
        "scheme",
        "weights, GiB",
        "KV, KiB/token",
        "sequences",
        "tokens/s",
        "ms/token",
        "first token, ms",
        "KL, nats",
    )
    more = f"; {left} more with --json" if left else ""
    return Table(f"Estimates for {device.name}, the best first{more}", columns, rows)


def _range(quality: QualityRange) -> str:
    if quality.basis == "exact":
        return "0"
    text = f"{quality.low:.4f}-{quality.high:.4f}"
    return f"{quality.low:.4f} measured" if quality.basis == "measured" else text


def _known(field: str, device: Device, efficiency: float) -> str:
    if field in device.measured:
        return "measured on this machine"
    return f"{efficiency:.0%} of the published figure ({device.source}); the share is assumed"


def _memory(chosen: Estimate, plain: Estimate | None, workload: Workload) -> str:
    ranks = " on each rank" if workload.tp > 1 else ""
    text = f"weights take {size(chosen.weight_bytes)}{ranks}"
    if plain is not None and not chosen.candidate.plain:
        text += f" instead of {size(plain.weight_bytes)}"
    return (
        f"{text}, the cache {chosen.kv_bytes_per_token / 1024:.1f} KiB a token; "
        f"{chosen.sequences:.1f} sequences of {workload.context} tokens fit."
    )


def _speed(chosen: Estimate, plain: Estimate | None, workload: Workload) -> str:
    text = (
        f"about {chosen.tokens_per_second:,.0f} tokens/s over {chosen.running} sequences "
        f"(prompts of {workload.prompt_tokens} tokens included), "
        f"{chosen.token_seconds * 1e3:.2f} ms a token, first token after "
        f"{chosen.first_token_seconds * 1e3:,.0f} ms"
    )
    if plain is None or chosen.candidate.plain:
        return f"{text}."
    if plain.sequences < 1:
        return f"{text}; in 16 bits not one sequence fits."
    gain = chosen.tokens_per_second / plain.tokens_per_second
    faster = plain.answer_seconds / chosen.answer_seconds
    return f"{text}: {gain:.2f}x the throughput of 16 bits, each answer {faster:.2f}x as fast."
