"""Which layer of a small model is written how, dialect by dialect."""

from __future__ import annotations

from quantkit_kernels.act_quant import PER_TENSOR
from tests.written_models import SchemeFor
from vllm_quantkit.formats import get_format
from vllm_quantkit.spec import ALL_ROWS, ActivationSpec, SchemeSpec, WeightSpec

TOKEN_INT8, TOKEN_FP8 = ActivationSpec(code="int8"), ActivationSpec(code="e4m3")
STATIC_INT8 = ActivationSpec(code="int8", dynamic=False, group_size=PER_TENSOR)
FLOAT = WeightSpec(bits=8, group_size=-1, symmetric=True, code_type="e4m3")
BLOCKS = FLOAT.model_copy(update={"group_size": 64, "scale_rows": 64})
"""Several to a row: compressed-tensors takes a single one for a scale per channel."""
TENSOR = FLOAT.model_copy(update={"scale_rows": ALL_ROWS})


def integers(
    bits: int, group_size: int, *, symmetric: bool = True, act_order: bool = False
) -> WeightSpec:
    return WeightSpec(bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order)


def compressed(weight: WeightSpec, activation: ActivationSpec | None = None) -> SchemeSpec:
    return get_format("compressed-tensors").scheme(weight, activation)


def gptq(weight: WeightSpec) -> SchemeSpec:
    return get_format("gptq").scheme(weight, None)


def quantkit(weight: WeightSpec, activation: ActivationSpec | None = None) -> SchemeSpec:
    return get_format("quantkit").scheme(weight, activation)


def by_part(default: SchemeSpec | None, parts: dict[str, SchemeSpec | None]) -> SchemeFor:
    """The scheme of the first part that a layer's name has."""

    def scheme_for(name: str) -> SchemeSpec | None:
        return next((scheme for part, scheme in parts.items() if part in name), default)

    return scheme_for


W8A8 = compressed(integers(8, -1), TOKEN_INT8)
W4_G32 = compressed(integers(4, 32))

UNIFORM = {
    "W4A16, group 32": W4_G32,
    "W4A16, group 64, asymmetric": compressed(integers(4, 64, symmetric=False)),
    "W4A16, order": compressed(integers(4, 64, act_order=True)),
    "W3A16, group 32": compressed(integers(3, 32, symmetric=False)),
    "W8A16 per channel": compressed(integers(8, -1)),
    "W8A16 of floats": compressed(FLOAT),
    "W8A8": W8A8,
    "W8A8, static": compressed(integers(8, -1), STATIC_INT8),
    "FP8": compressed(FLOAT, TOKEN_FP8),
    "FP8 per tensor": compressed(TENSOR, TOKEN_FP8),
    "FP8 blocks": compressed(BLOCKS, ActivationSpec(code="e4m3", group_size=64)),
}
"""compressed-tensors with one scheme for all layers."""

MIXED = by_part(W4_G32, {"down_proj": W8A8, "layers.0.mlp": None})
"""compressed-tensors in two formats, beside layers in 16 bits."""

MIXED_GPTQ = by_part(
    gptq(integers(4, 64)),
    {"layers.0.mlp": None, **dict.fromkeys(("q_p", "k_p", "v_p"), gptq(integers(4, 32)))},
)

MIXED_QUANTKIT = by_part(
    quantkit(integers(5, 32)),
    {
        "layers.1.mlp.down": quantkit(
            WeightSpec(bits=4, group_size=64, symmetric=True, code_type="nf4")
        ),
        "down_proj": quantkit(integers(3, 50, symmetric=False, act_order=True)),
        "o_proj": quantkit(integers(8, -1), TOKEN_INT8),
        "layers.1.mlp": None,
    },
)
"""3, 4, 5 and 8 bits, groups that divide nothing, stored order, a code book and activations."""
