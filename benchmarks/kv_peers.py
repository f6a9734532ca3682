"""What 4-bit caches do to attention: ours beside vLLM's own two, written again from definitions.

    python -m benchmarks.kv_peers --json results.json

Keys are synthetic, of one head of 128 dimensions after RoPE: Gaussian, with moderate outliers, or
with the large bias of Qwen2's keys on slowly rotating dimensions. Calibration sees other keys and
queries, at other positions, than those that are measured. Queries are scaled so that logits without
the bias have a standard deviation of 2.5.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from quantkit_kernels.kv_int4 import CacheLayout, KeyTreatment
from vllm_quantkit.hardware.machine import describe_machine
from vllm_quantkit.quantize.kv_cache.formats import int4_keys, int4_values
from vllm_quantkit.quantize.kv_cache.moments import KeyMoments

HEAD = 128
TOKENS, QUERIES = 2048, 256
CALIBRATION_POSITION = 5000
"""Of the first calibrated key; measured ones begin at 0."""

LOGIT_DEVIATION = 2.5
THETA = 1e6
"""RoPE's base."""

LEVELS = 16
SEEDS = tuple(range(2, 18))
"""Of measured heads, whose errors are averaged."""

Regime = Literal["gaussian", "outliers", "bias"]

RoundTrip = Callable[[Tensor], Tensor]
"""float32 [T, D] to what a cache makes of it."""


@dataclass(frozen=True)
class Sample:
    """One head's attention: query [N, D] at the end, key and value [T, D]."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Scheme:
    """A 4-bit cache.

    Attributes:
        bits: per value, scales among them, keys and values together.
        key, value: what becomes of them.
    """

    bits: float
    key: RoundTrip
    value: RoundTrip


@dataclass(frozen=True)
class Quality:
    """What a scheme costs.

    Attributes:
        logit_rmse: of q.(k^ - k), less its mean over keys, which softmax does not see.
        total_variation: between the softmaxes, half the sum of absolute differences.
        output_error: |o^ - o| / |o|, values in 4 bits too.
        bits: per value.
    """

    logit_rmse: float
    total_variation: float
    output_error: float
    bits: float


@cache
def hadamard(order: int) -> Tensor:
    """Sylvester's orthonormal matrix, float32 [order, order]; the order is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / order**0.5


def per_token_head(x: Tensor) -> Tensor:
    """vLLM's `int4_per_token_head`: codes rint(y / s + z), one s and z for all of y = (signs x) H.

    The zero-point is clamped to 0..15, though the range need not hold zero. 4 bits of the float32
    scale's mantissa make room for it.
    """
    signs = torch.randint(0, 2, (HEAD,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    y = (x * signs) @ hadamard(HEAD)
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-6)
    zero = torch.round(-low / scale).clamp(0, 15)
    codes = torch.round(y / scale + zero).clamp(0, 15)
    stored = (scale.view(torch.int32) & ~15).view(torch.float32)
    return ((codes - zero) * stored) @ hadamard(HEAD) * signs


@cache
def lloyd_max(levels: int) -> Tensor:
    """The levels nearest to a standard normal in mean square, float32 (J. Max, 1960)."""
    found = torch.linspace(-2.5, 2.5, levels, dtype=torch.float64)
    infinity = torch.tensor([torch.inf], dtype=torch.float64)
    for _ in range(2000):
        edges = torch.cat([-infinity, (found[1:] + found[:-1]) / 2, infinity])
        density = torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edges).diff()
        found = -density.diff() / mass
    return found.float()


def turboquant_keys(x: Tensor) -> Tensor:
    """vLLM's `turboquant_4bit_nc` for keys: |x| and the Lloyd-Max levels nearest to (x / |x|) H.

    Levels are those of a normal of variance 1 / D. The vector of levels is divided by its norm
    when read, and the norm of x is a float16 (arXiv 2504.19874).
    """
    norm = x.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    levels = lloyd_max(LEVELS) / HEAD**0.5
    unit = levels[torch.bucketize((x / norm) @ hadamard(HEAD), (levels[1:] + levels[:-1]) / 2)]
    unit = unit / unit.norm(dim=-1, keepdim=True)
    return (unit @ hadamard(HEAD)) * norm.half().float()


def turboquant_values(x: Tensor) -> Tensor:
    """vLLM's `turboquant_4bit_nc` for values: min(x) + code * s, both float16, not rotated."""
    low = x.amin(-1, keepdim=True)
    scale = ((x.amax(-1, keepdim=True) - low) / 15).clamp_min(1e-8)
    codes = torch.floor((x - low) / scale + 0.5).clamp(0, 15)
    return codes * scale.half().float() + low.half().float()


def make_keys(regime: Regime, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys before RoPE, float32 [tokens, D], the spread of each dimension, and their bias [D].

    Spread and bias are a layer's own: the same for every seed.
    """
    layer, own = torch.Generator().manual_seed(123), torch.Generator().manual_seed(seed)
    spread = torch.exp((0.7 if regime == "outliers" else 0.35) * torch.randn(HEAD, generator=layer))
    bias = torch.zeros(HEAD)
    if regime == "outliers":
        large = torch.randperm(HEAD, generator=layer)[:8]
        sign = torch.randint(0, 2, (8,), generator=layer) * 2.0 - 1
        bias[large] = sign * torch.empty(8).uniform_(5, 12, generator=layer)
    elif regime == "bias":
        slow = torch.tensor([50, 55, 58, 60])
        bias[slow], bias[slow + HEAD // 2] = 280.0 * (1 - slow % 2 * 2), 120.0
    heavy = torch.exp(0.25 * torch.randn(tokens, 1, generator=own))
    return torch.randn(tokens, HEAD, generator=own) * spread * heavy + bias, spread, bias


def rope(x: Tensor, positions: Tensor) -> Tensor:
    """Dimensions i and i + D / 2 turned by position * theta^(-2 i / D) (arXiv 2104.09864)."""
    turns = THETA ** (-torch.arange(HEAD // 2, dtype=torch.float64) * 2 / HEAD)
    angle = positions[:, None].double() * turns
    cos, sin = angle.cos().float(), angle.sin().float()
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def make_sample(regime: Regime, seed: int) -> Sample:
    """Keys at positions 0 to T - 1, and queries at T."""
    key, spread, bias = make_keys(regime, TOKENS, seed)
    own = torch.Generator().manual_seed(1000 + seed)
    positions, last = torch.arange(TOKENS), torch.full((QUERIES,), TOKENS)
    query = rope(torch.randn(QUERIES, HEAD, generator=own) * spread, last)
    plain = query @ rope(key - bias, positions).T
    query = query * (LOGIT_DEVIATION / plain.std(-1, keepdim=True))
    return Sample(query, rope(key, positions), torch.randn(TOKENS, HEAD, generator=own))


def calibrate(regime: Regime) -> KeyTreatment:
    """Shift and scale from other keys and queries, at other positions, than `make_sample` has."""
    moments = KeyMoments(1, HEAD, torch.device("cpu"))
    positions = CALIBRATION_POSITION + torch.arange(TOKENS)
    for half in (0, 1):
        key, spread, _ = make_keys(regime, TOKENS, 100 + half)
        own = torch.Generator().manual_seed(1100 + half)
        query = torch.randn(TOKENS, HEAD, generator=own) * spread
        query, key = (rope(x, positions)[None, None] for x in (query, key))
        moments.add(query, key, key, half)
    return moments.treatment("shift+scale")


def ours(treatment: KeyTreatment, key_group: Literal[32, 64] = 32) -> Scheme:
    """This package's cache."""
    layout = CacheLayout(HEAD, 16, key_group)
    key, value = int4_keys(layout, treatment), int4_values(layout)
    return Scheme(
        8 * layout.token_bytes / (2 * HEAD),
        lambda x: key(x[:, None])[:, 0],
        lambda x: value(x[:, None])[:, 0],
    )


def schemes(regime: Regime) -> dict[str, Scheme]:
    """Name to scheme."""
    treatment = calibrate(regime)
    return {
        "int4_per_token_head": Scheme(8 * 136 / (2 * HEAD), per_token_head, per_token_head),
        "turboquant_4bit_nc": Scheme(8 * 134 / (2 * HEAD), turboquant_keys, turboquant_values),
        "quantkit, uncalibrated": ours(KeyTreatment()),
        "quantkit, calibrated": ours(treatment),
        "quantkit, calibrated, key_group 64": ours(treatment, 64),
    }


def measure(scheme: Scheme, sample: Sample) -> Quality:
    """Attention with a scheme beside attention without."""
    key, value = scheme.key(sample.key), scheme.value(sample.value)
    apart = sample.query @ (key - sample.key).T
    apart = apart - apart.mean(-1, keepdim=True)
    exact, found = ((sample.query @ k.T).softmax(-1) for k in (sample.key, key))
    out = exact @ sample.value
    return Quality(
        float(apart.square().mean().sqrt()),
        float((found - exact).abs().sum(-1).mean() / 2),
        float((found @ value - out).norm() / out.norm()),
        scheme.bits,
    )


def average(qualities: list[Quality]) -> Quality:
    """The root mean square of RMSEs, the mean of the rest."""
    n = len(qualities)
    return Quality(
        math.sqrt(sum(q.logit_rmse**2 for q in qualities) / n),
        sum(q.total_variation for q in qualities) / n,
        sum(q.output_error for q in qualities) / n,
        qualities[0].bits,
    )


def compare(regime: Regime, seeds: tuple[int, ...]) -> dict[str, Quality]:
    """Every scheme on the same heads."""
    samples = [make_sample(regime, seed) for seed in seeds]
    return {
        name: average([measure(scheme, sample) for sample in samples])
        for name, scheme in schemes(regime).items()
    }


def main() -> None:
    """Print a table for each kind of keys, and write it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/kv_quality.json"))
    path: Path = parser.parse_args().json
    results = {regime: compare(regime, SEEDS) for regime in get_args(Regime)}
    for regime, found in results.items():
        print(f"{regime:36} logit RMSE  total variation  output error  bits per value")
        for name, q in found.items():
            errors = f"{q.logit_rmse:10.3f}  {q.total_variation:15.3f}  {q.output_error:12.3f}"
            print(f"  {name:34} {errors}  {q.bits:14.3f}")
    record = {
        "machine": describe_machine(),
        "keys": f"synthetic, {len(SEEDS)} heads of {HEAD} dimensions, {TOKENS} tokens, after RoPE",
        "results": {
            regime: {name: asdict(q) for name, q in found.items()}
            for regime, found in results.items()
        },
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
