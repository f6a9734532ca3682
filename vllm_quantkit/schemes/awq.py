"""AWQ checkpoints: 4-bit weights whose salient channels were scaled up (arXiv 2306.00978)."""

from vllm_quantkit.schemes.base import LinearScheme, Method
from vllm_quantkit.schemes.wna16 import WNA16
from vllm_quantkit.spec import SchemeSpec


class AWQ(Method):
    """`--quantization quantkit-awq`."""

    name = "quantkit-awq"
    dialects = ("awq", "compressed-tensors")

    @classmethod
    def linear(cls, spec: SchemeSpec) -> LinearScheme:
        """Integer weights, 16-bit activations."""
        return WNA16(spec)
