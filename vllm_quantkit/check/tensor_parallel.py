"""Whether a model divides over ranks, as vLLM checks it before it builds a layer."""

from __future__ import annotations

from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.footprint import ModelFacts

MOST_RANKS = 64
"""Sizes that are proposed."""


def check_ranks(facts: ModelFacts, ranks: int) -> None:
    """Heads and channels divide by the tensor-parallel size.

    Raises:
        UnsupportedScheme: they do not; names the sizes that do.
    """
    fault = _fault(facts, ranks)
    if fault:
        sizes = ", ".join(map(str, allowed_ranks(facts)))
        raise UnsupportedScheme(
            f"--tensor-parallel-size {ranks} does not divide this model: {fault}. Use {sizes}."
        )


def allowed_ranks(facts: ModelFacts) -> tuple[int, ...]:
    """Tensor-parallel sizes that divide the model, ascending."""
    return tuple(n for n in range(1, MOST_RANKS + 1) if not _fault(facts, n))


def _fault(facts: ModelFacts, ranks: int) -> str:
    """What a size does not divide; empty for nothing."""
    if facts.heads % ranks:
        return f"it has {facts.heads} attention heads"
    if not facts.mla and max(facts.kv_heads, ranks) % min(facts.kv_heads, ranks):
        return f"it has {facts.kv_heads} KV heads"
    if facts.intermediate_size % ranks:
        return f"its MLP has {facts.intermediate_size} channels"
    return ""
