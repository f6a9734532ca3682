"""INT4 weight-only made at load, without data: grids of least squared error, or HQQ."""

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.options import LayerOptions
from vllm_quantkit.schemes.base import Method
from vllm_quantkit.spec import SchemeSpec, WeightSpec

GROUP_SIZE = 128


class Int4(Method):
    """`--quantization quantkit-int4`."""

    name = "quantkit-int4"
    dialects = ("compressed-tensors", "awq", "gptq", "gptq_v2")
    contents = "4-bit integer weights with 16-bit activations"
    options = ("group_size", "symmetric", "refine")

    @classmethod
    def serves(cls, spec: SchemeSpec) -> bool:
        """4-bit integer weights, 16-bit activations."""
        weight = spec.weight
        return weight.code_type == "int" and weight.bits == 4 and spec.activation is None

    @classmethod
    def at_load(cls, options: LayerOptions) -> SchemeSpec:
        """Asymmetric groups of 128, each clipped to its range of least squared error.

        Raises:
            ConfigError: HQQ is asked for without zero-points, which it moves.
        """
        if options.refine == "hqq" and options.symmetric:
            raise ConfigError(
                "--additional-config quantkit: refine = 'hqq' moves zero-points, but symmetric = "
                "true has none; use refine 'clip', or leave symmetric out."
            )
        return SchemeSpec(
            dialect="16-bit",
            variant=options.refine or "clip",
            weight=WeightSpec(
                bits=4,
                group_size=options.group_size or GROUP_SIZE,
                symmetric=bool(options.symmetric),
            ),
        )
