"""Which layers of a model are served quantised: asked by an engine, or before one is started."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.spec import SchemeSpec

MIN_CAPABILITY = 80
"""10 * compute capability from which the CUDA kernels run (bf16 tensor cores, cp.async): Ampere."""


def common_scheme(prefix: str, schemes: Mapping[str, SchemeSpec | None]) -> SchemeSpec | None:
    """The scheme of a layer of the model that is made of several of the checkpoint.

    Args:
        prefix: the model's layer.
        schemes: of the checkpoint layers merged into it, by name; None for 16 bits.

    Raises:
        UnsupportedScheme: they differ.
    """
    first, *others = schemes.values()
    if all(other == first for other in others):
        return first
    different = ", ".join(f"{name}: {describe(spec)}" for name, spec in schemes.items())
    raise UnsupportedScheme(
        f"vLLM merges the layers of {prefix} into one, so they must share a scheme, but the "
        f"checkpoint has {different}. Quantise them alike, or leave all of them in 16 bits."
    )


def experts_refused(method: str, prefix: str) -> UnsupportedScheme:
    """Why the experts `prefix` of a mixture are not served quantised by `method`."""
    return UnsupportedScheme(
        f"{method} does not serve mixture-of-experts layers ({prefix}); drop --quantization to let "
        f"vLLM serve this checkpoint itself."
    )


def describe(spec: SchemeSpec | None) -> str:
    """A scheme in a few words."""
    return "16 bits" if spec is None else spec.describe()
