"""What an attention call needs beside queries and a cache: treatment of keys, batch, softmax."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class KeyTreatment(NamedTuple):
    """k' = ((k - shift) / scale) R: what is done to a key before it is quantised.

    Attributes:
        shift: float32 [kv_heads, head_size], or None for 0.
        scale: float32 [kv_heads, head_size], positive, or None for 1.
    """

    shift: Tensor | None = None
    scale: Tensor | None = None


class Batch(NamedTuple):
    """Which queries belong to which request, and where its tokens lie in the cache.

    A request whose tokens or queries number 0 is padding.

    Attributes:
        block_table: int32 [requests, max_blocks].
        seq_lens: int32 [requests], tokens in the cache, those of this step too.
        query_start: int32 [requests + 1], the row of a request's first query.
        max_query_len: upper bound of a request's queries, known to the host.
        max_seq_len: upper bound of `seq_lens`, known to the host.
    """

    block_table: Tensor
    seq_lens: Tensor
    query_start: Tensor
    max_query_len: int
    max_seq_len: int


class Softmax(NamedTuple):
    """How products of queries and keys become probabilities.

    Attributes:
        scale: logit = scale * q . k.
        window: a query at position p sees keys p - window < j <= p; 0 for all j <= p.
        softcap: logit = softcap * tanh(logit / softcap); 0 for none.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
