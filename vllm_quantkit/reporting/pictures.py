"""Pictures of what was measured of one model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from vllm_quantkit.evaluate.sensitivity import LayerSensitivity
from vllm_quantkit.long_generation.result import Decoding, Divergence
from vllm_quantkit.reporting.distribution import Distribution
from vllm_quantkit.reporting.drawing import (
    BLUE,
    GREY,
    INK,
    VERMILION,
    Picture,
    draw,
    legend_above,
    plain_ticks,
)

NAMES = ("tokens", "layers", "along", "survival")
"""Of all pictures here."""

LOOKS = {"greedy": (BLUE, "o", "-"), "sampled": (VERMILION, "s", "--")}
"""Colour, mark and line of each decoding."""

SMALLEST = 1e-7
"""KL in nats that float32 logits can tell from 0, about: less is drawn as this."""

BARS = 24
"""Groups of layers that are drawn: the ones to look at first."""


def distribution_picture(found: Distribution) -> Picture | None:
    """Share of tokens below a KL divergence, and below a loss; None without a base."""
    if not found.divergences:
        return None
    shares, divergences = found.shares, [max(value, SMALLEST) for value in found.divergences]
    by_share = dict(zip(shares, found.divergences, strict=True))

    def paint(left: Any, right: Any) -> None:
        left.plot(divergences, shares, color=BLUE)
        left.set(xscale="log", xlabel="KL(base || model) of a token, nats")
        left.set(ylabel="share of tokens with at most that", ylim=(0, 1.02))
        left.locator_params(axis="x", numticks=5)
        plain_ticks(left.xaxis)
        right.plot(found.base_losses, shares, color=GREY, linestyle="--", label="base, 16 bits")
        right.plot(found.losses, shares, color=BLUE, label="model")
        right.set(xlabel="loss of a token, -ln p, nats", ylim=(0, 1.02))
        right.legend(loc="lower right")

    alt = (
        f"Half of the tokens have a KL divergence of at most {by_share[0.5]:.2g} nats, 99 % of "
        f"at most {by_share[0.99]:.2g}; the largest is {by_share[1.0]:.2g}."
    )
    return draw("tokens", "Divergence and loss, token by token", alt, paint, columns=2)


def layers_picture(layers: Sequence[LayerSensitivity]) -> Picture | None:
    """What the costliest groups of layers cost, a bar each; None where there are none."""
    groups = [layer for layer in layers if not layer.is_block] or list(layers)
    if not groups:
        return None
    shown = sorted(groups, key=lambda layer: layer.kl, reverse=True)[:BARS]
    names = [f"{layer.group}  ({layer.bits:.3g} bits)" for layer in shown]

    def paint(axes: Any) -> None:
        colours = [BLUE if layer.kl >= 0 else VERMILION for layer in shown]
        axes.barh(range(len(shown)), [layer.kl for layer in shown], color=colours, height=0.7)
        axes.set_yticks(range(len(shown)), names, fontsize="small")
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.locator_params(axis="x", nbins=5)
        plain_ticks(axes.xaxis)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(xlabel=f"KL divergence, nats per token ({shown[0].method})")

    alt = (
        f"Of {len(groups)} groups of layers, {shown[0].group} costs most: {shown[0].kl:.3g} nats "
        f"for each token; of the {len(shown)} shown, {shown[-1].group} least: {shown[-1].kl:.3g}."
    )
    return draw("layers", "Where the error comes from", alt, paint, (7.2, 1.2 + 0.26 * len(shown)))


def along_picture(decodings: Sequence[Decoding]) -> Picture | None:
    """KL along the base's text, with its intervals; None where no text was scored."""
    scored = [decoding for decoding in decodings if decoding.curve]
    if not scored:
        return None

    def paint(axes: Any) -> None:
        for decoding in scored:
            colour, mark, line = LOOKS[decoding.name]
            middles = [(part.first + part.last) / 2 for part in decoding.curve]
            means = [part.divergence for part in decoding.curve]
            axes.fill_between(
                middles,
                [mean.low for mean in means],
                [mean.high for mean in means],
                color=colour,
                alpha=0.18,
                linewidth=0,
            )
            style = {"color": colour, "marker": mark, "linestyle": line, "markersize": 4}
            axes.plot(middles, [m.value for m in means], label=f"{decoding.name} text", **style)
        axes.set(ylim=(0, _ceiling(scored)), xlim=(0, None))
        axes.set(xlabel="token of the continuation", ylabel="KL(base || model), nats per token")
        plain_ticks(axes.yaxis)
        legend_above(axes)

    alt = "; ".join(map(_along, scored)) + "."
    return draw("along", "Divergence along the base's text", alt, paint)


def survival_picture(decodings: Sequence[Decoding]) -> Picture:
    """Share of continuations that are still the same as the base's."""

    def paint(axes: Any) -> None:
        for decoding in decodings:
            colour, _, line = LOOKS[decoding.name]
            _paint_survival(axes, decoding.divergence, f"{decoding.name} text", colour, line)
        for noise in (d.noise for d in decodings if d.noise is not None):
            _paint_survival(axes, noise, "base beside itself, other batches", GREY, ":")
        axes.set(xlabel="token of the continuation", ylabel="share still the same as the base's")
        # Most texts part early, if they do.
        axes.set(ylim=(0, 1.05), xscale="log")
        plain_ticks(axes.xaxis)
        legend_above(axes)

    parted = (
        f"{decoding.name}, {_parted(decoding.divergence)}"
        + ("" if decoding.noise is None else f" (the base from itself: {_parted(decoding.noise)})")
        for decoding in decodings
    )
    alt = f"Texts that part from the base's: {'; '.join(parted)}."
    return draw("survival", "How long texts stay the same", alt, paint)


def _paint_survival(axes: Any, found: Divergence, label: str, colour: str, line: str) -> None:
    """A curve that falls where texts part, with a mark where texts that stayed the same end."""
    steps = [(1, 1.0), *((step.position, step.share) for step in found.survival)]
    last = max(chain(found.lengths, (step[0] for step in steps)))
    steps.append((last, steps[-1][1]))
    x, y = zip(*steps, strict=True)
    axes.step(x, y, where="post", color=colour, linestyle=line, label=label)
    ends = sorted(n for at, n in zip(found.positions, found.lengths, strict=True) if at is None)
    heights = [next(share for at, share in reversed(steps[:-1]) if at <= end) for end in ends]
    axes.plot(ends, heights, "|", color=colour, markersize=9)


def _ceiling(decodings: Sequence[Decoding]) -> float:
    """Room for the intervals, unless one of few prompts would press the curves flat."""
    parts = [part.divergence for decoding in decodings for part in decoding.curve]
    value, high = max(part.value for part in parts), max(part.high for part in parts)
    return min(1.1 * high, 2.2 * value) or 1.0


def _along(decoding: Decoding) -> str:
    first, last = decoding.curve[0], decoding.curve[-1]
    return (
        f"{decoding.name} text: {first.divergence.value:.3g} nats per token at its beginning, "
        f"{last.divergence.value:.3g} at token {last.last:,}"
    )


def _parted(found: Divergence) -> str:
    parted = len(found.positions) - found.positions.count(None)
    return f"{parted} of {len(found.positions)}"
