"""What an engine with an INT4 KV cache computes: transformers, its keys and values rounded.

Position j is read rounded by query i where j came in an earlier step than i, or where everything is
read from the cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantkit_kernels.kv_int4 import CacheLayout, KeyTreatment
from quantkit_kernels.kv_int4.reference import dequantise, quantise
from quantkit_kernels.kv_int4.rotation import rotate_keys, rotate_values, unrotate

NAME = "kv_int4_oracle"
Treatments = Mapping[int, KeyTreatment]
"""Decoder layer to what is done to its keys."""


def rounded(heads: Tensor, rotated: Tensor, group: int) -> Tensor:
    """[T, H, D], what the cache keeps of `heads`, whose rotation is given, turned back."""
    kept = dequantise(*quantise(rotated, group))
    return unrotate(kept, heads.shape[-1])


def cached(key: Tensor, value: Tensor, treatment: KeyTreatment) -> tuple[Tensor, Tensor]:
    """Keys and values [T, H, D] as they are read from the cache."""
    layout = CacheLayout(key.shape[-1], 32)
    kept = rounded(key, rotate_keys(key, treatment), layout.key_dimensions)
    if treatment.scale is not None:
        kept = kept * treatment.scale
    if treatment.shift is not None:
        kept = kept + treatment.shift
    return kept, rounded(value, rotate_values(value), layout.value_dimensions)


class Oracle:
    """A model whose attention reads a cache.

    Attributes:
        steps: the step in which each position was computed; None reads everything from the cache.
    """

    def __init__(
        self, folder: Path, treatments: Treatments | None = None, skipped: Sequence[int] = ()
    ) -> None:
        self.steps: Tensor | None = None
        self._treatments, self._skipped = treatments or {}, skipped
        ALL_ATTENTION_FUNCTIONS.register(NAME, self._attention)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=NAME
        ).eval()

    @torch.no_grad()
    def scores(self, tokens: list[int], steps: Sequence[int] | None) -> list[float]:
        """log p(token | tokens before it); `steps` are the lengths of the prompt's pieces."""
        logits = self._logits(tokens, steps)
        following = torch.tensor(tokens[1:])[:, None]
        return logits[:-1].log_softmax(-1).gather(1, following)[:, 0].tolist()

    @torch.no_grad()
    def regret(self, tokens: list[int], steps: Sequence[int] | None, made: list[int]) -> float:
        """How much more likely, in nats, the likeliest token ever was than the one that was made.

        Each of `made` came in a step of its own.
        """
        decoded = None if steps is None else [*steps, *[0] * len(made)]
        logits = self._logits([*tokens, *made], decoded)[len(tokens) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(made)[:, None])[:, 0]
        return float((logits.amax(-1) - chosen).max())

    def _logits(self, tokens: list[int], steps: Sequence[int] | None) -> Tensor:
        self.steps = None if steps is None else _step_of(steps)
        ALL_ATTENTION_FUNCTIONS.register(NAME, self._attention)
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0]

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """[1, T, H, D] of query [1, H, T, D], key and value [1, Hkv, T, D]."""
        layer = module.layer_idx
        group, tokens = query.shape[1] // key.shape[1], query.shape[2]
        keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
        kept = keys, values
        if layer not in self._skipped:
            kept = cached(keys, values, self._treatments.get(layer, KeyTreatment()))
        raw, old = (
            [tensor.transpose(0, 1).repeat_interleave(group, 0) for tensor in pair]
            for pair in ((keys, values), kept)
        )
        reads_cache = self._reads_cache(tokens)
        logits = torch.where(reads_cache, *(query[0] @ k.mT * scaling for k in (old[0], raw[0])))
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~_visible(tokens, sliding_window), -math.inf)
        weights = logits.softmax(-1)
        out = (weights * reads_cache) @ old[1] + (weights * ~reads_cache) @ raw[1]
        return out.transpose(0, 1)[None], None

    def _reads_cache(self, tokens: int) -> Tensor:
        if self.steps is None:
            return torch.ones(tokens, tokens, dtype=torch.bool)
        steps = self.steps[:tokens]
        decoded = steps < 0
        return (steps[:, None] != steps[None, :]) | decoded[:, None]


def _step_of(lengths: Sequence[int]) -> Tensor:
    """The number of each position's step; -1 for tokens that were decoded (length 0)."""
    numbers = [
        step
        for number, length in enumerate(lengths)
        for step in ([number] * length if length else [-1])
    ]
    return torch.tensor(numbers)


def _visible(tokens: int, window: int | None) -> Tensor:
    position = torch.arange(tokens)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < (window or tokens))
