"""Everything that takes part."""

from __future__ import annotations

from benchmarks.gpu import (
    ours,
    peers_torch,
    peers_vllm_fused,
    peers_vllm_scaled,
    peers_vllm_weights,
)
from benchmarks.gpu.contender import Contender
from benchmarks.gpu.problems import Op

MODULES = (ours, peers_torch, peers_vllm_weights, peers_vllm_scaled, peers_vllm_fused)


def contenders(only: str = "") -> list[Contender]:
    """All contenders whose name holds `only`."""
    found = [contender for module in MODULES for contender in module.contenders()]
    return [contender for contender in found if only in contender.name]


def find(name: str, op: Op) -> Contender:
    """The contender of a name and operation.

    Raises:
        KeyError: there is none.
    """
    for contender in contenders():
        if contender.name == name and contender.op == op:
            return contender
    raise KeyError(f"no contender is named {name!r} for {op}")
