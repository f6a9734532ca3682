"""SmoothQuant at load: Y = (X / s)(s W), the division folded into what makes X.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", https://arxiv.org/abs/2211.10438. X comes from a norm, whose weight is divided; or, as an
addition to the paper, from v or up, whose rows and bias are. The factors are powers of two, so that
all this is exact in every floating-point format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.integration.blocks import DecoderLayers, Feed
from vllm_quantkit.integration.names import LayerNames
from vllm_quantkit.integration.sharding import ShardId, expected_outputs
from vllm_quantkit.quantize.methods.smoothquant import Sharing, smooth_weight, smoothing_factors

ALONE = Sharing(sharers=1, width=1)


@dataclass(frozen=True)
class Link:
    """A linear layer and what makes its input.

    Attributes:
        feed: both.
        sharing: which channels of the input are one channel of its source.
        shard: the partition of the source that makes the input, if that is a linear layer.
    """

    feed: Feed
    sharing: Sharing = ALONE
    shard: ShardId = None


class Smoothing:
    """The factors of every layer whose source can be divided, and what is done with them."""

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

    @property
    def smoothed(self) -> int:
        """How many layers have factors."""
        return len(self._factors)

    def smooth(self, weight: Tensor, prefix: str, *, has_last: bool) -> Tensor:
        """A weight [n, K] of the layer `prefix` as it reads and makes smoothed activations.

        Args:
            weight: one or several of the layer's partitions.
            prefix: the layer's name in the model.
            has_last: the weight ends with the layer's last partition.

        Raises:
            CheckpointError: the statistics lack the layer, or are for another model.
        """
        inputs = None
        if prefix in self._links:
            inputs = self._links[prefix].sharing.spread(self._source_factors(prefix))
        return smooth_weight(weight, inputs, self._outputs(prefix) if has_last else None)

    def fold(self) -> None:
        """Divide norms and biases by the factors of what they feed; all layers are loaded."""
        for prefix, factors in self._factors.items():
            link = self._links[prefix]
            if link.shard is None:
                fold_into_norm(link.feed.source, factors)
            else:
                fold_into_bias(link.feed.source, factors, link.shard)

    @cached_property
    def _links(self) -> dict[str, Link]:
        """By the name of the layer that reads. First asked for when the model is built."""
        norms = [Link(feed) for feed in self._layers.norm_feeds() if _is_ours(feed.linear)]
        linears = [
            _linear_link(feed)
            for feed in self._layers.linear_feeds()
            if _is_ours(feed.source) and _is_ours(feed.linear)
        ]
        return {link.feed.linear.quant_method.prefix: link for link in (*norms, *linears)}

    @cached_property
    def _readers(self) -> dict[str, str]:
        """Merged layer to the layer that reads the last of its partitions."""
        return {
            link.feed.source.quant_method.prefix: prefix
            for prefix, link in self._links.items()
            if link.shard is not None
        }

    def _outputs(self, prefix: str) -> Tensor | None:
        """float32 [n]: what the rows of the last partition of `prefix` are divided by."""
        reader = self._readers.get(prefix)
        return None if reader is None else self._source_factors(reader)

    def _source_factors(self, prefix: str) -> Tensor:
        """float32, a factor for each channel of what feeds the layer `prefix`."""
        if prefix not in self._factors:
            link = self._links[prefix]
            partitions = link.feed.linear.quant_method.partitions
            inputs = torch.stack([self._stats_of(name) for name in partitions]).amax(0)
            weights = self._column_maxima(prefix, partitions)
            if inputs.shape != weights.shape:
                raise CheckpointError(
                    f"the activation statistics of {partitions[0]} are for {inputs.numel()} input "
                    f"channels, but the layer has {weights.numel()}; collect them from this model."
                )
            largest = link.sharing.largest
            self._factors[prefix] = smoothing_factors(
                largest(inputs), largest(weights), self._alpha
            )
        return self._factors[prefix]

    def _column_maxima(self, prefix: str, partitions: tuple[str, ...]) -> Tensor:
        """float32 [K], the largest |w| of each input channel, rows divided as they will be."""
        weights = [self._names.tensors(name)["weight"] for name in partitions]
        weights[-1] = smooth_weight(weights[-1], None, self._outputs(prefix))
        return torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)

    def _stats_of(self, name: str) -> Tensor:
        """float32 [K], the largest |x| of the model's layer `name`.

        Raises:
            CheckpointError: the statistics lack it.
        """
        stored = self._names.checkpoint_name(name) or name
        if stored not in self._stats:
            raise CheckpointError(
                f"the file of activation_stats has no entry for {stored}; collect the statistics "
                f"from this model with quantkit calibrate MODEL --calibration TEXT --out FILE."
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


@torch.no_grad()
def fold_into_bias(layer: Any, factors: Tensor, shard: ShardId) -> None:
    """bias[n] <- bias[n] / s[n] for this rank's rows of one partition; nothing without a bias.

    Args:
        layer: a merged linear layer.
        factors: float32, for all rows of the partition, over all ranks.
        shard: the partition.
    """
    if getattr(layer, "bias", None) is None:
        return
    divisors = Parameter(torch.ones_like(layer.bias), requires_grad=False)
    divisors.output_dim = 0  # type: ignore[attr-defined]  # what vLLM cuts
    layer.weight_loader(divisors, factors.to(layer.bias), shard)
    layer.bias.div_(divisors)


def _is_ours(layer: Any) -> bool:
    return hasattr(layer.quant_method, "partitions")


def _linear_link(feed: Feed) -> Link:
    source = feed.source
    if not hasattr(source, "total_num_kv_heads"):
        return Link(feed, shard=len(source.output_sizes) - 1)
    width = getattr(source, "v_head_size", source.head_size)
    sharers = feed.linear.input_size // expected_outputs(source, "v")
    return Link(feed, Sharing(sharers, width), "v")
