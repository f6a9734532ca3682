"""INT8 weight-only: half the bytes, activations untouched."""

from vllm_quantkit.options import LayerOptions
from vllm_quantkit.schemes.base import Method
from vllm_quantkit.spec import PER_CHANNEL, SchemeSpec, WeightSpec


class Int8(Method):
    """`--quantization quantkit-int8`."""

    name = "quantkit-int8"
    dialects = ("compressed-tensors", "gptq", "gptq_v2")
    contents = "8-bit integer weights with 16-bit activations"
    options = ("group_size", "symmetric", "refine")

    @classmethod
    def serves(cls, spec: SchemeSpec) -> bool:
        """8-bit integer weights, 16-bit activations."""
        weight = spec.weight
        return weight.code_type == "int" and weight.bits == 8 and spec.activation is None

    @classmethod
    def at_load(cls, options: LayerOptions) -> SchemeSpec:
        """Symmetric, one scale per channel; 8 bits gain nothing from a search."""
        symmetric = True if options.symmetric is None else options.symmetric
        return SchemeSpec(
            dialect="16-bit",
            variant=options.refine or "none",
            weight=WeightSpec(
                bits=8, group_size=options.group_size or PER_CHANNEL, symmetric=symmetric
            ),
        )
