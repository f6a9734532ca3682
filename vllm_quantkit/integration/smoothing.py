"""SmoothQuant at load: Y = (X / s)(s W), s folded into the norm before the layer.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", https://arxiv.org/abs/2211.10438. The factors are powers of two, so that dividing a norm's
weight and multiplying the layer's are exact in every floating-point format.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.integration.blocks import DecoderLayers, Feed
from vllm_quantkit.integration.names import LayerNames
from vllm_quantkit.quantize.smoothquant import smoothing_factors


class Smoothing:
    """The factors of every layer behind a norm, and what is done with them."""

    def __init__(
        self,
        stats: Mapping[str, Tensor],
        alpha: float,
        names: LayerNames,
        layers: DecoderLayers,
    ) -> None:
        """`stats`: checkpoint layer to the largest |x| of each input channel, float32 [K]."""
        self._stats, self._alpha, self._names, self._layers = stats, alpha, names, layers
        self._factors: dict[str, Tensor] = {}
        self._feeds: dict[str, Feed] = {}

    @property
    def smoothed(self) -> int:
        """How many layers have factors."""
        return len(self._factors)

    def factors(self, prefix: str, partitions: tuple[str, ...]) -> Tensor | None:
        """float32 [K], s of the layer `prefix`; None where no norm alone feeds it.

        Raises:
            CheckpointError: the statistics lack the layer, or are for another model.
        """
        if not self._feeds:
            self._feeds = {
                feed.linear.quant_method.prefix: feed
                for feed in self._layers.norm_feeds()
                if hasattr(feed.linear.quant_method, "prefix")
            }
        if prefix not in self._feeds:
            return None
        if prefix not in self._factors:
            self._factors[prefix] = self._make(partitions)
        return self._factors[prefix]

    def fold(self) -> None:
        """Divide each norm's weight by its layer's factors; all layers are loaded."""
        for prefix, factors in self._factors.items():
            fold_into_norm(self._feeds[prefix].source, factors)

    def _make(self, partitions: tuple[str, ...]) -> Tensor:
        weights = [self._names.tensors(name)["weight"] for name in partitions]
        maxima = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)
        inputs = torch.stack([self.stats(name) for name in partitions]).amax(0)
        if inputs.shape != maxima.shape:
            raise CheckpointError(
                f"the activation statistics of {partitions[0]} are for {inputs.numel()} input "
                f"channels, but the layer has {maxima.numel()}; collect them from this model."
            )
        return smoothing_factors(inputs, maxima, self._alpha)

    def stats(self, name: str) -> Tensor:
        """float32 [K], the largest |x| of the model's layer `name`.

        Raises:
            CheckpointError: the statistics lack it.
        """
        stored = self._names.checkpoint_name(name) or name
        if stored not in self._stats:
            raise CheckpointError(
                f"the file of activation_stats has no entry for {stored}; collect the statistics "
                f"from this model with python -m vllm_quantkit.quantize.activation_stats."
            )
        return self._stats[stored]


@torch.no_grad()
def fold_into_norm(norm: torch.nn.Module, factors: Tensor) -> None:
    """weight <- weight / s; Gemma's norms multiply by 1 + weight, which is kept in float32."""
    weight = norm.get_parameter("weight")
    factors = factors.to(weight.device)
    if type(norm).__name__.startswith("Gemma"):
        weight.data = (weight.float() + 1) / factors - 1
    else:
        weight.data = weight / factors.to(weight.dtype)
