"""How fast this machine's kernels are: one layer of each scheme, timed for a second or two."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, log

import torch
from torch import Tensor

from vllm_quantkit.advise.candidates import SCHEMES, Scheme
from vllm_quantkit.advise.roofline import Rates
from vllm_quantkit.formats import Role
from vllm_quantkit.schemes.at_load import load_rules
from vllm_quantkit.schemes.base import LinearKernel, PackedLayer
from vllm_quantkit.schemes.linear import linear_scheme
from vllm_quantkit.schemes.registry import get_method
from vllm_quantkit.spec import Frozen, LayerShape, SchemeSpec

LARGEST = 2048
"""Rows and columns of the layer that is timed, at most: it is quantised in well under a second."""

CACHE_BYTES = 96 << 20
"""Weights that take turns are larger than this, so that none waits in a cache."""

ROUNDS = 8
SECONDS = 0.03
"""Rounds of each measurement, and the least time of each."""

Linear = Callable[[Tensor], Tensor]


class KernelSpeed(Frozen):
    """Time of a layer's product.

    Attributes:
        scheme: of the layer.
        rows: of its input.
        seconds_per_weight: of its weights.
    """

    scheme: str
    rows: int
    seconds_per_weight: float


@dataclass(frozen=True)
class MeasuredClock:
    """Times of linear layers in proportion to their weights, as measured here.

    Attributes:
        speeds: of each scheme at several numbers of rows; others lie on lines between them on
            logarithmic scales, and beyond them in proportion to rows.
        rates: what reading a layer's bytes takes at least.
    """

    speeds: tuple[KernelSpeed, ...]
    rates: Rates

    def seconds(self, scheme: Scheme, weights: int, nbytes: int, rows: int) -> float:
        """Of layers with so many weights, for so many rows."""
        known = sorted(
            (speed.rows, speed.seconds_per_weight)
            for speed in self.speeds
            if speed.scheme == _timed(scheme).name
        )
        return weights * _between(known, rows)


def measure_kernels(
    shape: LayerShape, rows: Sequence[int], schemes: Sequence[Scheme], device: str = "cpu"
) -> tuple[KernelSpeed, ...]:
    """The least time over rounds in which the schemes take turns: what other work disturbed least.

    Args:
        shape: of a representative layer; a piece of it is timed where it is large.
        rows: of its input.
        schemes: those that share a kernel are timed once.
        device: `cpu` or `cuda`.
    """
    timed = dict.fromkeys((SCHEMES[0], *map(_timed, schemes)))
    shape = LayerShape(
        out_features=_piece(shape.out_features), in_features=_piece(shape.in_features)
    )
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.out_features, shape.in_features, generator=generator) * 0.02
    weight = weight.to(device, torch.bfloat16)
    layers = {scheme: _layers(scheme, weight) for scheme in timed}
    found = []
    for count in sorted(set(rows)):
        x = torch.randn(count, shape.in_features, generator=generator).to(device, torch.bfloat16)
        found += [
            KernelSpeed(scheme=scheme.name, rows=count, seconds_per_weight=time / weight.numel())
            for scheme, time in _race(layers, x).items()
        ]
    return tuple(found)


def _timed(scheme: Scheme) -> Scheme:
    """The first scheme of the same kernel and numerics: AWQ, GPTQ and INT4 at load share one."""
    return next(
        other
        for other in SCHEMES
        if other == scheme or (scheme.at_load is not None and other.at_load == scheme.at_load)
    )


def _piece(size: int) -> int:
    """At most `LARGEST`, and a multiple of 128 where the layer is that large."""
    size = min(size, LARGEST)
    return size - size % 128 if size >= 128 else size


def _race(layers: dict[Scheme, list[Linear]], x: Tensor) -> dict[Scheme, float]:
    """Seconds of a call of each, the least over interleaved rounds."""
    times: dict[Scheme, list[float]] = {scheme: [] for scheme in layers}
    for turns in layers.values():
        turns[0](x)
    for _ in range(ROUNDS):
        for scheme, turns in layers.items():
            times[scheme].append(_seconds(turns, x))
    return {scheme: min(taken) for scheme, taken in times.items()}


def _seconds(layers: list[Linear], x: Tensor) -> float:
    """Mean time of a call over at least `SECONDS`, the layers in turn."""
    calls, start = 0, time.perf_counter()
    while True:
        layers[calls % len(layers)](x)
        calls += 1
        if time.perf_counter() - start > SECONDS:
            break
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _layers(scheme: Scheme, weight: Tensor) -> list[Linear]:
    """The layer, and copies of it until no cache holds them all."""
    if scheme.at_load is None:
        copies = ceil(CACHE_BYTES / (2 * weight.numel()))
        return [_dense(weight.clone()) for _ in range(copies)]
    packed = _pack(_spec(scheme), weight)
    nbytes = sum(tensor.numel() * tensor.itemsize for tensor in packed.tensors.values())
    copies = ceil(CACHE_BYTES / nbytes)
    return [
        _product(packed.kernel, {name: tensor.clone() for name, tensor in packed.tensors.items()})
        for _ in range(copies)
    ]


def _dense(weight: Tensor) -> Linear:
    return lambda x: torch.nn.functional.linear(x, weight)


def _product(kernel: LinearKernel, tensors: dict[str, Tensor]) -> Linear:
    return lambda x: kernel.apply(x, tensors, None)


def _spec(scheme: Scheme) -> SchemeSpec:
    """How the scheme's method stores a layer at load.

    Raises:
        ConfigError: the scheme's options do not fit its method.
    """
    if scheme.at_load is None:
        raise ValueError(f"{scheme.name} quantises nothing")
    rules = load_rules(get_method(scheme.at_load), scheme.options)
    spec = rules.default
    if spec is None:
        raise ValueError(f"{scheme.at_load} leaves layers in 16 bits")
    return spec


def _pack(spec: SchemeSpec, weight: Tensor) -> PackedLayer:
    scheme = linear_scheme(spec)
    quantized = scheme.quantize(weight)
    parts = {
        Role.CODES: quantized.codes,
        Role.SCALES: quantized.scales,
        Role.ZEROS: quantized.zeros,
        Role.GROUP_INDEX: quantized.group_index,
    }
    return scheme.pack(parts, torch.bfloat16)


def _between(known: Sequence[tuple[int, float]], rows: int) -> float:
    """The line between neighbours on logarithmic scales; proportional to rows beyond the last."""
    if rows <= known[0][0]:
        return known[0][1]
    for (low, first), (high, second) in pairwise(known):
        if rows <= high:
            share = log(rows / low) / log(high / low)
            return float(first * (second / first) ** share)
    return known[-1][1] * rows / known[-1][0]
