"""FP8: E4M3 weights and activations, both in 8 bits (arXiv 2209.05433)."""

from quantkit_kernels.act_quant import PER_TENSOR, PER_TOKEN
from vllm_quantkit.options import LayerOptions
from vllm_quantkit.schemes.base import Method
from vllm_quantkit.spec import (
    ALL_ROWS,
    PER_CHANNEL,
    ActivationSpec,
    SchemeSpec,
    WeightSpec,
)

CODE_TYPES = ("e4m3", "e5m2")


class FP8(Method):
    """`--quantization quantkit-fp8`."""

    name = "quantkit-fp8"
    dialects = ("fp8", "compressed-tensors", "fbgemm_fp8")
    contents = "FP8 weights, per tensor, channel or block"
    options = ("weight_scales", "activation_scales")

    @classmethod
    def serves(cls, spec: SchemeSpec) -> bool:
        """E4M3 or E5M2 weights; activations in 8 or 16 bits."""
        return spec.weight.code_type in CODE_TYPES

    @classmethod
    def at_load(cls, options: LayerOptions) -> SchemeSpec:
        """E4M3 weights per channel, activations per token, unless the options say per tensor."""
        rows = ALL_ROWS if options.weight_scales == "tensor" else 1
        tokens = PER_TENSOR if options.activation_scales == "tensor" else PER_TOKEN
        return SchemeSpec(
            dialect="16-bit",
            variant="none",
            weight=WeightSpec(
                bits=8, group_size=PER_CHANNEL, symmetric=True, code_type="e4m3", scale_rows=rows
            ),
            activation=ActivationSpec(code="e4m3", group_size=tokens),
        )
