"""What an engine's process holds."""

from __future__ import annotations

from vllm_quantkit.bench.measures import Asked
from vllm_quantkit.spec import Frozen


class Memory(Frozen):
    """Memory of one engine.

    Attributes:
        weight_bytes: of one rank's weights, packed for its kernels.
        cache_tokens: that the KV cache holds.
        peak_bytes: the most that a rank held: of its GPU as PyTorch reserved it, the KV cache
            included, or of the host's memory where there is no GPU.
    """

    weight_bytes: int
    cache_tokens: int
    peak_bytes: int


def measure_memory(engine: Asked) -> Memory:
    """Asked at the end, when the peak was reached.

    Raises:
        EngineError: the engine died.
    """
    held = engine.ask("memory")
    return Memory(
        weight_bytes=max(rank["weights"] for rank in held["ranks"]),
        cache_tokens=held["cache"]["tokens"],
        peak_bytes=engine.ask("peak")["bytes"],
    )
