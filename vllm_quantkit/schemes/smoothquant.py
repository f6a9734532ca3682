"""SmoothQuant: INT8 weights and activations, Y = (X / s)(s W) (arXiv 2211.10438)."""

from vllm_quantkit.options import LayerOptions
from vllm_quantkit.schemes.base import Method
from vllm_quantkit.spec import PER_CHANNEL, ActivationSpec, SchemeSpec, WeightSpec

HOW_TO_SMOOTH = (
    "activations are quantised as they are: smoothing needs the largest input of every channel. "
    "Collect it with `quantkit calibrate MODEL --calibration TEXT --out FILE` and pass "
    '--additional-config \'{"quantkit": {"activation_stats": "FILE"}}\'.'
)


class SmoothQuant(Method):
    """`--quantization quantkit-smoothquant`."""

    name = "quantkit-smoothquant"
    dialects = ("compressed-tensors",)
    contents = "INT8 weights with INT8 activations"
    smooths = True

    @classmethod
    def serves(cls, spec: SchemeSpec) -> bool:
        """Both operands are integers."""
        activation = spec.activation
        return (
            spec.weight.code_type == "int"
            and activation is not None
            and activation.code == "int8"
            and activation.outlier_threshold is None
        )

    @classmethod
    def at_load(cls, options: LayerOptions) -> SchemeSpec:
        """INT8 per channel, dynamic INT8 activations per token."""
        return SchemeSpec(
            dialect="16-bit",
            variant="none",
            weight=WeightSpec(bits=8, group_size=PER_CHANNEL, symmetric=True),
            activation=ActivationSpec(code="int8"),
        )
