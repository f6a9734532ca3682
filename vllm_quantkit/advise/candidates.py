"""What can be advised: schemes for weights and activations, each with a KV cache."""

from __future__ import annotations

from typing import Literal

from vllm_quantkit.footprint import KVCache
from vllm_quantkit.hardware import Number
from vllm_quantkit.options import Options
from vllm_quantkit.spec import Frozen

SchemeName = Literal["16-bit", "fp8", "fp8-block", "smoothquant", "int8", "awq", "gptq", "int4"]
CacheName = Literal["auto", "fp8", "int4"]


class Scheme(Frozen):
    """How weights and activations are stored and multiplied.

    Attributes:
        name: short.
        words: for people.
        label: behind the model's name, in the names of folders.
        quantize: `--scheme` of `quantkit quantize`; None where the model is quantised at load, or
            not at all.
        method: `--quantization` that serves it; None for plain vLLM.
        at_load: the method whose layers have the same size and kernel when a 16-bit model is
            loaded, which tells the footprint without a checkpoint; None for 16 bits.
        symmetric: of its weights; None where the method decides.
        number: what its products are made of, on devices that multiply it; else 16-bit floats.
        weight_bits: of the weights.
        calibrated: True where it is made from text.
    """

    name: SchemeName
    words: str
    label: str = ""
    quantize: str | None = None
    method: str | None = None
    at_load: str | None = None
    symmetric: bool | None = None
    number: Number = "bf16"
    weight_bits: int = 16
    calibrated: bool = False

    @property
    def options(self) -> Options:
        """Of `at_load`."""
        return Options(symmetric=self.symmetric)

    @property
    def activation_bits(self) -> int:
        """8 where activations are quantised, too, else 16."""
        return 8 if self.name in ("fp8", "fp8-block", "smoothquant") else 16


SCHEMES: tuple[Scheme, ...] = (
    Scheme(name="16-bit", words="16-bit weights"),
    Scheme(
        name="fp8",
        words="FP8 weights per channel, FP8 activations per token",
        label="FP8",
        quantize="fp8",
        method="quantkit-fp8",
        at_load="quantkit-fp8",
        number="fp8",
        weight_bits=8,
    ),
    Scheme(
        name="fp8-block",
        words="FP8 weights in blocks of 128 x 128, FP8 activations",
        label="FP8-BLOCK",
        quantize="fp8-block",
        method="quantkit-fp8-block",
        at_load="quantkit-fp8-block",
        number="fp8",
        weight_bits=8,
    ),
    Scheme(
        name="smoothquant",
        words="SmoothQuant: INT8 weights and activations",
        label="W8A8",
        quantize="smoothquant",
        method="quantkit-smoothquant",
        at_load="quantkit-smoothquant",
        number="int8",
        weight_bits=8,
        calibrated=True,
    ),
    Scheme(
        name="int8",
        words="INT8 weights, 16-bit activations",
        label="W8A16",
        quantize="int8",
        method="quantkit-int8",
        at_load="quantkit-int8",
        weight_bits=8,
    ),
    Scheme(
        name="awq",
        words="AWQ: INT4 weights in groups of 128, 16-bit activations",
        label="AWQ",
        quantize="awq",
        method="quantkit-awq",
        at_load="quantkit-int4",
        symmetric=False,
        weight_bits=4,
        calibrated=True,
    ),
    Scheme(
        name="gptq",
        words="GPTQ: INT4 weights in groups of 128, 16-bit activations",
        label="GPTQ",
        quantize="gptq",
        method="quantkit-gptq",
        at_load="quantkit-int4",
        symmetric=True,
        weight_bits=4,
        calibrated=True,
    ),
    Scheme(
        name="int4",
        words="INT4 weights rounded at load, 16-bit activations",
        method="quantkit-int4",
        at_load="quantkit-int4",
        weight_bits=4,
    ),
)
"""Every scheme, the plainest first."""

CACHES: dict[CacheName, str] = {
    "auto": "16-bit KV cache",
    "fp8": "FP8 KV cache",
    "int4": "INT4 KV cache",
}
"""Every KV cache, in words."""


class Candidate(Frozen):
    """A scheme with a KV cache."""

    scheme: Scheme
    cache: CacheName = "auto"

    @property
    def name(self) -> str:
        """Short, such as `awq` or `fp8+kv-int4`."""
        return self.scheme.name + ("" if self.cache == "auto" else f"+kv-{self.cache}")

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.scheme.words}, {CACHES[self.cache]}"

    @property
    def plain(self) -> bool:
        """True where nothing is quantised."""
        return self.scheme.name == "16-bit" and self.cache == "auto"

    @property
    def kv(self) -> KVCache:
        """The KV cache."""
        return KVCache(dtype=self.cache)


def candidates() -> tuple[Candidate, ...]:
    """Every scheme with every KV cache."""
    return tuple(Candidate(scheme=scheme, cache=cache) for scheme in SCHEMES for cache in CACHES)


def scheme_named(name: str) -> Scheme:
    """The scheme of this name."""
    return next(scheme for scheme in SCHEMES if scheme.name == name)
