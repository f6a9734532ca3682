"""The quantising methods behind one interface: how a block is prepared, how a weight is rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.quantize.awq import awq
from vllm_quantkit.quantize.calibration import InputStats
from vllm_quantkit.quantize.gptq import gptq
from vllm_quantkit.quantize.rtn import rtn
from vllm_quantkit.spec import WeightSpec


class Method(Protocol):
    """A quantising method, bound to its numerics and options."""

    @property
    def spec(self) -> WeightSpec:
        """The numerics it rounds to."""

    @property
    def scales_channels(self) -> bool:
        """True where input channels are scaled, and the scales folded, before rounding."""

    def quantize(self, weight: Tensor, stats: InputStats) -> QuantizedWeight:
        """The codes of a weight [N, K] whose inputs have these moments."""


@dataclass(frozen=True)
class Rtn:
    """Round to nearest; looks at no inputs unless it clips."""

    spec: WeightSpec
    clip: bool = False
    scales_channels: ClassVar[bool] = False

    def quantize(self, weight: Tensor, stats: InputStats) -> QuantizedWeight:
        """See `rtn`."""
        return rtn(weight, self.spec, clip=self.clip, hessian=stats.hessian)


@dataclass(frozen=True)
class Gptq:
    """Error feedback along the input channels, on grids of least squared error."""

    spec: WeightSpec
    damping: float = 0.01
    clip: bool = True
    scales_channels: ClassVar[bool] = False

    def quantize(self, weight: Tensor, stats: InputStats) -> QuantizedWeight:
        """See `gptq`."""
        return gptq(weight, stats.hessian, self.spec, damping=self.damping, clip=self.clip)


@dataclass(frozen=True)
class Awq:
    """Activation-aware channel scales, then clipping."""

    spec: WeightSpec
    scales_channels: ClassVar[bool] = True

    def quantize(self, weight: Tensor, stats: InputStats) -> QuantizedWeight:
        """See `awq`."""
        return awq(weight, stats, self.spec)


METHODS = {"rtn": Rtn, "gptq": Gptq, "awq": Awq}
"""Name to class; each can be made from a `WeightSpec` alone."""
