"""Which product serves a layer: it follows from the numerics of its weight and activations."""

from vllm_quantkit.schemes.base import LinearScheme
from vllm_quantkit.schemes.llm_int8 import MixedInt8
from vllm_quantkit.schemes.w8a8 import W8A8
from vllm_quantkit.schemes.wna16 import WNA16
from vllm_quantkit.spec import SchemeSpec


def linear_scheme(spec: SchemeSpec) -> LinearScheme:
    """The product of a layer described by `spec`."""
    if spec.activation is None:
        return WNA16(spec)
    if spec.activation.outlier_threshold is not None:
        return MixedInt8(spec)
    return W8A8(spec)
