"""INT4 weight-only made at load, without data: grids of least squared error, or HQQ."""

from vllm_quantkit.options import LayerOptions
from vllm_quantkit.schemes.base import Method
from vllm_quantkit.schemes.integers_at_load import OPTIONS, weight_only
from vllm_quantkit.spec import SchemeSpec, WeightSpec

GROUPS = WeightSpec(bits=4, group_size=128, symmetric=False)


class Int4(Method):
    """`--quantization quantkit-int4`."""

    name = "quantkit-int4"
    dialects = ("compressed-tensors", "awq", "gptq", "gptq_v2")
    contents = "4-bit integer weights with 16-bit activations"
    options = OPTIONS

    @classmethod
    def serves(cls, spec: SchemeSpec) -> bool:
        """4-bit integer weights, 16-bit activations."""
        weight = spec.weight
        return weight.code_type == "int" and weight.bits == 4 and spec.activation is None

    @classmethod
    def at_load(cls, options: LayerOptions) -> SchemeSpec:
        """Asymmetric groups of 128, each clipped to its range of least squared error.

        Raises:
            ConfigError: see `weight_only`.
        """
        return weight_only(options, GROUPS, "clip")
