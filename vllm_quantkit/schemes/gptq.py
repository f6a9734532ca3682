"""GPTQ checkpoints: rounded column by column with the inverse Hessian (arXiv 2210.17323)."""

from vllm_quantkit.schemes.base import LinearScheme, Method
from vllm_quantkit.schemes.wna16 import WNA16
from vllm_quantkit.spec import SchemeSpec


class GPTQ(Method):
    """`--quantization quantkit-gptq`."""

    name = "quantkit-gptq"
    dialects = ("gptq", "gptq_v2", "compressed-tensors")

    @classmethod
    def linear(cls, spec: SchemeSpec) -> LinearScheme:
        """Integer weights, 16-bit activations."""
        return WNA16(spec)
