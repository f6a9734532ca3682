"""A layer as vLLM's own choice of a kernel sees it."""

from __future__ import annotations

from typing import Literal

from quantkit_kernels.act_quant.rows import PER_TOKEN
from vllm_quantkit.spec import PER_CHANNEL, Frozen, LayerShape, SchemeSpec

Product = Literal[
    "16 bits",
    "integer weights",
    "INT8",
    "FP8",
    "FP8 blocks",
    "FP8 weights",
    "code books",
]
"""What is multiplied: weights with 16-bit activations, or both in 8 bits."""


class PlainLayer(Frozen):
    """A linear layer on one tensor-parallel rank.

    Attributes:
        spec: how the checkpoint stores it; None for 16 bits.
        method: `quant_method` of the checkpoint.
        shape: of the whole layer.
        rank_shape: of the rank's share.
        rank_rows: rows of that share in each merged layer.
        dtype: of activations.
        expert: True for a mixture's experts.
    """

    spec: SchemeSpec | None
    method: str
    shape: LayerShape
    rank_shape: LayerShape
    rank_rows: tuple[int, ...]
    dtype: str = "bfloat16"
    expert: bool = False

    @property
    def product(self) -> Product:
        """What is multiplied."""
        if self.spec is None:
            return "16 bits"
        weight, activation = self.spec.weight, self.spec.activation
        if weight.code_type in ("nf4", "fp4"):
            return "code books"
        if weight.code_type == "int":
            return "integer weights" if activation is None else "INT8"
        if activation is None:
            return "FP8 weights"
        return "FP8 blocks" if weight.group_size != PER_CHANNEL else "FP8"

    @property
    def splits_inputs(self) -> bool:
        """True where ranks share the input channels."""
        return self.rank_shape.in_features != self.shape.in_features

    @property
    def per_token_and_channel(self) -> bool:
        """True for scales per output channel, and dynamic ones per token."""
        if self.spec is None or self.spec.activation is None:
            return False
        weight, activation = self.spec.weight, self.spec.activation
        token = activation.dynamic and activation.group_size == PER_TOKEN
        return token and weight.group_size == PER_CHANNEL and weight.scale_rows == 1
