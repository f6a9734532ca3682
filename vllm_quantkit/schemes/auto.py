"""`--quantization quantkit`: the checkpoint says what it is."""

from vllm_quantkit.formats import FORMATS
from vllm_quantkit.schemes.base import LinearScheme, Method
from vllm_quantkit.schemes.wna16 import WNA16
from vllm_quantkit.spec import SchemeSpec


class Auto(Method):
    """Any dialect; the scheme of each layer follows from its spec."""

    name = "quantkit"
    dialects = tuple(FORMATS)

    @classmethod
    def linear(cls, spec: SchemeSpec) -> LinearScheme:
        """Integer weights, 16-bit activations: what every dialect served so far holds."""
        return WNA16(spec)
