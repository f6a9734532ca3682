"""What a group of layers costs, and how it was found."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vllm_quantkit.spec import Frozen

SensitivityMethod = Literal["exact restore", "exact quantise", "fisher approximation"]
"""How a group's share was found.

    exact restore           KL(base || model) less the KL with the group back in 16 bits
    exact quantise          KL(base || base with only this group quantised)
    fisher approximation    the latter, to second order in the error of the group's outputs

The approximation takes a handful of passes for all groups together, where the exact ones take one
for each group. On the demo model its order of groups is that of `exact quantise` (Spearman's
correlation 0.97 or more for AWQ, GPTQ and FP8).
"""


class LayerSensitivity(Frozen):
    """What quantising a group of layers costs; layers that read the same input share a group.

    Attributes:
        group: name, with the members that are fused when served in one, such as
            `model.layers.0.self_attn.qkv_proj`; or a block, such as `model.layers.0`.
        members: names of its layers in the checkpoint.
        kl: mean nats for each token; may be negative where another layer's error is undone.
        method: how it was found.
        bits: of its weights; those of a block's layers on average.
        is_block: True for a whole block, whose layers also have groups of their own.
    """

    group: str
    members: tuple[str, ...]
    kl: float
    method: SensitivityMethod
    bits: float = Field(gt=0)
    is_block: bool = False
