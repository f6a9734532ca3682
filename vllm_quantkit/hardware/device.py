"""What a device is, as far as the speed and memory of a model depend on it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vllm_quantkit.spec import Frozen

Kind = Literal["cuda", "cpu", "apple"]
"""Whose kernels serve a model there; none of vLLM's do on Apple's GPUs."""

Number = Literal["bf16", "fp8", "int8"]
"""What a device multiplies."""

THIS_MACHINE = "this machine"
"""`Device.source` of what is in this machine and in no catalogue."""


class Device(Frozen):
    """A GPU, the CPUs of a machine, or an Apple chip.

    Attributes:
        name: as its maker says it.
        kind: whose kernels serve it.
        memory_bytes: memory that one engine process may use, all of the device's.
        bandwidth: bytes that it reads a second, at most.
        capability: CUDA compute capability.
        peaks: multiplications and additions a second of dense matrix products, by number; numbers
            it does not multiply, or whose rate nobody publishes, are missing.
        isa: of CPUs, what they can do, in Linux's words.
        cores: of CPUs, those this process may use.
        measured: names of fields, and of numbers of `peaks`, that were measured on this machine.
        source: URL of the maker's figures, or `THIS_MACHINE`.
    """

    name: str
    kind: Kind
    memory_bytes: int = Field(gt=0)
    bandwidth: float = Field(ge=0)
    capability: tuple[int, int] | None = None
    peaks: dict[Number, float] = Field(default_factory=dict)
    isa: tuple[str, ...] = ()
    cores: int | None = None
    measured: tuple[str, ...] = ()
    source: str

    @property
    def multiplies_fp8(self) -> bool:
        """True for GPUs whose tensor cores have FP8: Ada, Hopper and later."""
        return self.kind == "cuda" and self.capability is not None and self.capability >= (8, 9)
