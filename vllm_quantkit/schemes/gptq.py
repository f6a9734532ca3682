"""GPTQ checkpoints: rounded column by column with the inverse Hessian (arXiv 2210.17323)."""

from vllm_quantkit.schemes.base import Method
from vllm_quantkit.spec import SchemeSpec


class GPTQ(Method):
    """`--quantization quantkit-gptq`."""

    name = "quantkit-gptq"
    dialects = ("gptq", "gptq_v2", "compressed-tensors")
    config_files = ("quantize_config.json", "quant_config.json")
    contents = "integer weights with 16-bit activations"

    @classmethod
    def serves(cls, spec: SchemeSpec) -> bool:
        """Integer weights, 16-bit activations."""
        return spec.weight.code_type == "int" and spec.activation is None
