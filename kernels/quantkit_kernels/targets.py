"""What a kernel is chosen for: a device at hand, or one that is only known by its data."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """What the choice of a kernel, and with it its name, depends on.

    Attributes:
        device_type: as of torch, `cpu` or `cuda`; all others run the generic kernels.
        capability: (major, minor) of a CUDA device's compute capability.
        features: what a CPU can do, by LLVM's names.
    """

    device_type: str
    capability: tuple[int, int] | None = None
    features: frozenset[str] = frozenset()


def target_of(device: torch.device) -> Target:
    """The device at hand."""
    if device.type == "cuda":
        return Target("cuda", torch.cuda.get_device_capability(device))
    if device.type == "cpu":
        from quantkit_kernels.cpu.host import host_features

        return Target("cpu", features=host_features())
    return Target(device.type)
