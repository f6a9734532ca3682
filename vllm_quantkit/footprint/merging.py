"""Which layers vLLM merges into one, and how tensor parallelism cuts the result.

As in vLLM's model classes: `QKVParallelLinear` and `MergedColumnParallelLinear` hold several of a
checkpoint's layers, `RowParallelLinear` cuts inputs, and small latent projections are on every
rank whole (https://docs.vllm.ai/en/latest/design/arch_overview.html).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.footprint.facts import ModelFacts, Parallel

MERGED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    ("w13", ("w1", "w3")),
)
"""Name of the merged layer to the last parts of its members' names, in order."""

LATENT = "kv_a_proj_with_mqa"
"""A sibling of latent attention's `q_proj`, whose keys and values are no layers of their own."""

ROW = frozenset(
    {
        *("o_proj", "down_proj", "out_proj", "c_proj", "fc2", "w2", "wo", "dense", "fc_out"),
        *("dense_4h_to_h", "linear_out"),
    }
)
"""Layers that read what the ranks have made each for themselves."""

REPLICATED = frozenset(
    {
        *("gate", "router", "shared_expert_gate", "q_a_proj", "kv_a_proj_with_mqa"),
        *("fused_qkv_a_proj", "score", "classifier"),
    }
)
"""Small layers, and those whose output every rank needs whole."""

KEYS_AND_VALUES = frozenset({"k_proj", "v_proj"})
QKV = frozenset({"qkv_proj", "query_key_value", "Wqkv", "c_attn", "qkv"})
"""Layers that a checkpoint stores merged."""


def merge(leaves: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """The layers of one module as vLLM has them: name, and the members it merges.

    Args:
        leaves: last parts of the names of the module's layers.
    """
    left = list(dict.fromkeys(leaves))
    made = []
    for name, members in MERGED:
        present = tuple(member for member in members if member in left)
        if len(present) > 1 or (present == ("q_proj",) and LATENT not in left):
            made.append((name, present))
            left = [leaf for leaf in left if leaf not in present]
    return [*made, *((leaf, (leaf,)) for leaf in left)]


def parallel_of(name: str) -> Parallel:
    """How a layer, merged or not, is cut."""
    if name in REPLICATED:
        return "replicated"
    return "row" if name in ROW else "column"


def member_rows(name: str, rows: Mapping[str, int], facts: ModelFacts) -> dict[str, int]:
    """Rows of each partition of a layer: of its members, or of what is stored merged already."""
    if name in QKV and len(rows) == 1:
        (stored,) = rows.values()
        query = facts.heads * facts.head_dim
        key, value = facts.kv_heads * facts.head_dim, facts.kv_heads * facts.value_dim
        if stored == query + key + value:
            return {"q_proj": query, "k_proj": key, "v_proj": value}
    if name == "gate_up_proj" and len(rows) == 1:
        (stored,) = rows.values()
        return {"gate_proj": stored // 2, "up_proj": stored - stored // 2}
    return dict(rows)


def rank_rows(
    parts: Mapping[str, int], parallel: Parallel, facts: ModelFacts, tp: int
) -> tuple[int, ...]:
    """Rows of one rank in each partition; heads of keys and values are repeated where few.

    Raises:
        UnsupportedScheme: they do not divide.
    """
    if parallel != "column" or tp == 1:
        return tuple(parts.values())
    heads = max(tp, facts.kv_heads)
    return tuple(
        divided(rows * heads // facts.kv_heads if name in KEYS_AND_VALUES else rows, tp, name)
        for name, rows in parts.items()
    )


def check_heads(facts: ModelFacts, tp: int) -> None:
    """Heads divide among the ranks, or ranks among the heads of keys and values.

    Raises:
        UnsupportedScheme: they do not; names sizes that do.
    """
    if facts.heads % tp == 0 and (facts.kv_heads % tp == 0 or tp % facts.kv_heads == 0):
        return
    possible = [size for size in range(1, facts.heads + 1) if facts.heads % size == 0]
    possible = [n for n in possible if facts.kv_heads % n == 0 or n % facts.kv_heads == 0]
    raise UnsupportedScheme(
        f"{facts.heads} heads with {facts.kv_heads} of keys and values do not divide among {tp} "
        f"tensor-parallel ranks; use one of {', '.join(map(str, possible))}."
    )


def divided(size: int, tp: int, what: str) -> int:
    """size / tp.

    Raises:
        UnsupportedScheme: it does not divide.
    """
    if size % tp:
        raise UnsupportedScheme(
            f"{what} has {size} channels, which do not divide among {tp} tensor-parallel ranks; "
            "choose another tensor-parallel size."
        )
    return size // tp
