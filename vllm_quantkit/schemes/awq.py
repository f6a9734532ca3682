"""AWQ checkpoints: 4-bit weights whose salient channels were scaled up (arXiv 2306.00978)."""

from vllm_quantkit.schemes.base import Method
from vllm_quantkit.spec import SchemeSpec


class AWQ(Method):
    """`--quantization quantkit-awq`."""

    name = "quantkit-awq"
    dialects = ("awq", "compressed-tensors")
    config_files = ("quantize_config.json", "quant_config.json")
    contents = "integer weights with 16-bit activations"

    @classmethod
    def serves(cls, spec: SchemeSpec) -> bool:
        """Integer weights, 16-bit activations."""
        return spec.weight.code_type == "int" and spec.activation is None
