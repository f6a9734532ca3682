"""Seeing queries, keys and values as attention gets them: rotated by position, heads not repeated.

Attention layers of transformers look their attention function up by a name in their config
(https://huggingface.co/docs/transformers/attention_interface). While a block is observed, that name
is ours, and what is registered under it hands the call on to the function that was there before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from vllm_quantkit.errors import UnsupportedScheme

OBSERVED = "quantkit_observed"
"""The registered name."""

LISTENER = "_quantkit_listener"
"""Attribute of an attention module in an observed block."""

OPTIONS = frozenset({"position_bias"})
"""Arguments of attention functions that change logits as no cache of 4 bits can serve."""


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention layer: logit = scale q.k, softcap tanh(logit / softcap).

    Attributes:
        query: float [B, heads, T, D].
        key: float [B, kv_heads, T, D].
        value: float [B, kv_heads, T, D].
        mask: what may be seen, bool [B or 1, heads or 1, T, T], or float that is 0 there; None is
            causal.
        scale: of the products.
        softcap: None for none.
        sinks: float [heads], one more logit without a value; None for none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None
    sinks: Tensor | None

    def visible(self, sample: int, rows: Tensor) -> Tensor:
        """bool [R, T]: which keys the queries at `rows` see in a sample.

        Raises:
            UnsupportedScheme: the mask adds more to logits than -inf, or differs between heads.
        """
        if self.mask is None:
            return torch.arange(self.key.shape[2], device=rows.device) <= rows[:, None]
        mask = self.mask[min(sample, len(self.mask) - 1)]
        if mask.shape[0] > 1:
            raise UnsupportedScheme(
                f"this model's attention masks differ between its {mask.shape[0]} heads, which a "
                "cache of 4 bits does not serve: leave its cache in 16 bits."
            )
        seen = mask[0, rows, : self.key.shape[2]]
        if seen.dtype == torch.bool:
            return seen
        allowed = seen > torch.finfo(seen.dtype).min / 2
        if bool((seen[allowed] != 0).any()):
            raise UnsupportedScheme(
                "this model adds a bias to its attention logits (ALiBi or the like), which a cache "
                "of 4 bits does not serve: leave its cache in 16 bits."
            )
        return allowed


Listener = Callable[[str, AttentionCall], None]
"""Is given the attention module's name inside the block, and what it was called with."""


@contextmanager
def observed_attention(block: nn.Module, listen: Listener) -> Iterator[None]:
    """Calls of the block's attention layers go through `listen` and compute what they always did.

    Args:
        block: a decoder block of its own (`ModelShell.block`): its modules are marked.
        listen: is told of every call.

    Raises:
        UnsupportedScheme: at the end, an attention layer ran that was not seen.
    """
    AttentionInterface.register(OBSERVED, _observed)
    names = {module: name for name, module in block.named_modules()}
    heard: set[str] = set()
    configs = _configs(block)
    own = [config._attn_implementation for config in configs]
    former = {id(config): name for config, name in zip(configs, own, strict=True)}

    def hear(module: nn.Module, call: AttentionCall) -> Any:
        heard.add(names[module])
        listen(names[module], call)
        return _function(module, former[id(module.config)])

    for module in block.modules():
        setattr(module, LISTENER, hear)
    for config in configs:
        config._attn_implementation = OBSERVED
    try:
        yield
    finally:
        for config, name in zip(configs, own, strict=True):
            config._attn_implementation = name
    _refuse_unheard(block, heard)


def _observed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The registered function: tells the module's listener, then computes as before."""
    if any(kwargs.get(name) is not None for name in OPTIONS):
        raise UnsupportedScheme(
            f"{type(module).__name__} adds a bias of positions to its logits, which a cache of 4 "
            "bits does not serve: leave its cache in 16 bits."
        )
    scaling = kwargs.get("scaling")
    call = AttentionCall(
        query.detach(),
        key.detach(),
        value.detach(),
        attention_mask,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        kwargs.get("softcap"),
        kwargs.get("s_aux"),
    )
    compute = getattr(module, LISTENER)(module, call)
    return compute(module, query, key, value, attention_mask, *args, **kwargs)


def _function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """What the module would have called; `eager` is a function beside its class."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if implementation == "eager" and own is None:
        raise UnsupportedScheme(
            f"{type(module).__name__} computes attention in a way that cannot be observed: leave "
            "this model's cache in 16 bits."
        )
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, own)
    return found


def _configs(block: nn.Module) -> list[Any]:
    """Configs of the block's modules, each once."""
    found = {}
    for module in block.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


def _refuse_unheard(block: nn.Module, heard: set[str]) -> None:
    """Refuses attention that does not look its function up, so that its keys were not seen."""
    for name, module in block.named_modules():
        related = any(
            other.startswith(f"{name}.") or name.startswith(f"{other}.") or other == name
            for other in heard
        )
        if type(module).__name__.endswith("Attention") and not related:
            raise UnsupportedScheme(
                f"{type(module).__name__} does not call its attention through transformers' "
                "attention interface, so its keys cannot be observed: leave this model's cache in "
                "16 bits, or serve it in 4 bits without calibration."
            )
