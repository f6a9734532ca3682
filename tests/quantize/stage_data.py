"""Inputs and weights of made-up layers, with their statistics, for the tests of the quantisers."""

import torch
from torch import Tensor

from vllm_quantkit.quantize.methods.rounding import Rounded, round_weights
from vllm_quantkit.quantize.observation.statistics import InputMoments, InputStats
from vllm_quantkit.quantize.recipes.recipe import LayerRecipe


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stats_of(inputs: Tensor, *, hessian: bool = True) -> InputStats:
    moments = InputMoments(inputs.shape[1], hessian=hessian, expected_rows=len(inputs))
    for half, rows in enumerate(inputs.chunk(2)):
        moments.add(rows, half)
    return moments.stats()


def correlated_inputs(channels: int, *, tokens: int = 512, seed: int = 0) -> Tensor:
    """Float32 [tokens, channels]: a few common causes, channels of different sizes."""
    causes = torch.randn(tokens, max(2, channels // 8), generator=generator(seed))
    mix = torch.randn(causes.shape[1], channels, generator=generator(seed + 1))
    noise = torch.randn(tokens, channels, generator=generator(seed + 2))
    sizes = torch.exp(0.5 * torch.randn(channels, generator=generator(seed + 3)))
    return (noise + 1.5 * causes @ mix / causes.shape[1] ** 0.5) * sizes


def random_weight(rows: int, channels: int, *, seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(rows, channels, generator=generator(seed))


def relative_error(inputs: Tensor, weight: Tensor, rounded: Tensor) -> float:
    """|X (W - Q)^T| / |X W^T|, from the inputs themselves, in float64."""
    inputs, weight, rounded = inputs.double(), weight.double(), rounded.double()
    return float((inputs @ (weight - rounded).T).norm() / (inputs @ weight.T).norm())


def round_weight(
    weight: Tensor, stats: InputStats | None, recipe: LayerRecipe, *, scale_dtype: torch.dtype
) -> Rounded:
    """The codes of one weight, see `round_weights`."""
    return round_weights([weight], stats, recipe, scale_dtype=scale_dtype)[0]
