"""INT8 weight-only: half the bytes, activations untouched."""

from vllm_quantkit.options import LayerOptions
from vllm_quantkit.schemes.base import Method
from vllm_quantkit.schemes.integers_at_load import OPTIONS, weight_only
from vllm_quantkit.spec import PER_CHANNEL, SchemeSpec, WeightSpec

CHANNELS = WeightSpec(bits=8, group_size=PER_CHANNEL, symmetric=True)


class Int8(Method):
    """`--quantization quantkit-int8`."""

    name = "quantkit-int8"
    dialects = ("compressed-tensors", "gptq", "gptq_v2")
    contents = "8-bit integer weights with 16-bit activations"
    options = OPTIONS

    @classmethod
    def serves(cls, spec: SchemeSpec) -> bool:
        """8-bit integer weights, 16-bit activations."""
        weight = spec.weight
        return weight.code_type == "int" and weight.bits == 8 and spec.activation is None

    @classmethod
    def at_load(cls, options: LayerOptions) -> SchemeSpec:
        """Symmetric, one scale per channel; 8 bits gain nothing from a search.

        Raises:
            ConfigError: see `weight_only`.
        """
        return weight_only(options, CHANNELS, "none")
