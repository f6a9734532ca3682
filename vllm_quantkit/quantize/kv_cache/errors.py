"""What formats of the cache cost a layer: its attention with them beside that in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vllm_quantkit.kv_calibration import KVErrors
from vllm_quantkit.quantize.kv_cache.attention import AttentionCall
from vllm_quantkit.quantize.kv_cache.formats import CacheFormat, RoundTrip

QUERIES = 256
"""Of a sample that errors are measured on, evenly over its positions, the last among them."""


@dataclass
class _Sums:
    """Of one format, over all rows seen; a row is a query of a head."""

    logits: float = 0.0
    products: int = 0
    softmax: float = 0.0
    rows: int = 0
    values: float = 0.0
    output: float = 0.0

    def errors(self, values: float, output: float) -> KVErrors:
        return KVErrors(
            logits=(self.logits / max(1, self.products)) ** 0.5,
            softmax=self.softmax / max(1, self.rows),
            values=(self.values / values) ** 0.5 if values else 0.0,
            output=(self.output / output) ** 0.5 if output else 0.0,
        )


class ErrorMeter:
    """Sums the errors of several formats over the calls of one layer.

    Args:
        formats: by any key.
        dtype: of the model's own cache, with which they are compared.
    """

    def __init__(self, formats: Mapping[str, CacheFormat], dtype: torch.dtype) -> None:
        self._formats = formats
        self._dtype = dtype
        self._sums = {name: _Sums() for name in formats}
        self._values = 0.0
        self._output = 0.0

    def add(self, call: AttentionCall) -> None:
        """Measures one call, sample by sample and KV head by KV head.

        Raises:
            UnsupportedScheme: see `AttentionCall.visible`.
        """
        for sample in range(len(call.query)):
            tokens = call.query.shape[2]
            step = -(-tokens // QUERIES)
            rows = torch.arange((tokens - 1) % step, tokens, step, device=call.query.device)
            queries = call.query[sample][:, rows]
            cut = (queries, call.key[sample], call.value[sample])
            self._add_sample(call, call.visible(sample, rows), *(self._held(x) for x in cut))

    def _add_sample(
        self, call: AttentionCall, visible: Tensor, queries: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Measures queries [heads, R, D] over keys and values [kv_heads, T, D]."""
        keys = {name: _in_heads(form.key, key) for name, form in self._formats.items()}
        trips = {form.value for form in self._formats.values()}
        backs = {trip: _in_heads(trip, value) for trip in trips}
        self._values += _power(value)
        for name, form in self._formats.items():
            self._sums[name].values += _power(backs[form.value] - value)
        group = len(queries) // len(key)
        for head in range(len(key)):
            mine = slice(head * group, (head + 1) * group)
            sinks = None if call.sinks is None else call.sinks[mine].float()
            attend = partial(_attended, queries[mine], visible=visible, call=call, sinks=sinks)
            exact = attend(key[head], value[head])
            self._output += _power(exact.output)
            for name, form in self._formats.items():
                found = attend(keys[name][head], backs[form.value][head])
                self._compare(self._sums[name], exact, found, visible)

    def _held(self, heads: Tensor) -> Tensor:
        """float32: what the model's own cache holds."""
        return heads.to(self._dtype).float()

    def errors(self) -> dict[str, KVErrors]:
        """Of each format."""
        return {name: sums.errors(self._values, self._output) for name, sums in self._sums.items()}

    @staticmethod
    def _compare(sums: _Sums, exact: _Attended, found: _Attended, visible: Tensor) -> None:
        apart = (found.logits - exact.logits).masked_fill(~visible, 0)
        mean = apart.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True)
        sums.logits += _power((apart - mean).masked_fill(~visible, 0))
        sums.products += int(visible.sum()) * len(apart)
        sums.softmax += float((found.softmax - exact.softmax).abs().sum(dtype=torch.float64)) / 2
        sums.rows += apart.shape[0] * apart.shape[1]
        sums.output += _power(found.output - exact.output)


@dataclass(frozen=True)
class _Attended:
    """One KV head's attention, float32.

    Attributes:
        logits: [G, R, T], before the soft cap; of its G query heads and R queries.
        softmax: [G, R, T], or [G, R, T + 1] with sinks.
        output: [G, R, D].
    """

    logits: Tensor
    softmax: Tensor
    output: Tensor


def _attended(
    queries: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    call: AttentionCall,
    sinks: Tensor | None,
) -> _Attended:
    """Queries [G, R, D] over keys and values [T, D]."""
    logits = call.scale * (queries @ key.mT)
    capped = logits
    if call.softcap is not None:
        capped = call.softcap * torch.tanh(logits / call.softcap)
    capped = capped.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        capped = torch.cat((capped, sinks[:, None, None].expand(*capped.shape[:2], 1)), -1)
    softmax = capped.softmax(-1)
    return _Attended(logits, softmax, softmax[..., : len(value)] @ value)


def _in_heads(round_trip: RoundTrip, heads: Tensor) -> Tensor:
    """`round_trip` of [kv_heads, T, D], which takes and gives tokens first."""
    return round_trip(heads.transpose(0, 1)).transpose(0, 1)


def _power(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
