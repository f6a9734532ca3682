"""Block FP8: weights in blocks of 128 x 128, activations in groups of 128 (arXiv 2412.19437)."""

from vllm_quantkit.options import LayerOptions
from vllm_quantkit.schemes.base import Method
from vllm_quantkit.spec import ActivationSpec, SchemeSpec, WeightSpec

BLOCK = 128


class FP8Block(Method):
    """`--quantization quantkit-fp8-block`."""

    name = "quantkit-fp8-block"
    dialects = ("fp8", "compressed-tensors")
    contents = "FP8 weights in blocks"

    @classmethod
    def serves(cls, spec: SchemeSpec) -> bool:
        """FP8 weights whose scales belong to blocks."""
        return spec.weight.code_type == "e4m3" and spec.weight.scale_rows > 1

    @classmethod
    def at_load(cls, options: LayerOptions) -> SchemeSpec:
        """E4M3 blocks of 128 x 128, dynamic activations in groups of 128."""
        return SchemeSpec(
            dialect="16-bit",
            variant="none",
            weight=WeightSpec(
                bits=8, group_size=BLOCK, symmetric=True, code_type="e4m3", scale_rows=BLOCK
            ),
            activation=ActivationSpec(code="e4m3", group_size=BLOCK),
        )
