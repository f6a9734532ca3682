"""The decoder layers of a model under construction, and what feeds which linear layer."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


@dataclass(frozen=True)
class Block:
    """What a class of decoder layers is made of, by names inside the layer.

    Attributes:
        norms: (norm, the linear layer that alone reads its output).
        activations: (silu-and-multiply, the linear layer that alone reads its output).
        linears: (merged linear layer, the linear layer that alone reads the last of its
            partitions: v or up). A scale of a channel passes through what lies between them.
    """

    norms: tuple[tuple[str, str], ...]
    activations: tuple[tuple[str, str], ...]
    linears: tuple[tuple[str, str], ...]


ATTENTION, MLP = "self_attn.qkv_proj", "mlp.gate_up_proj"
LINEARS = ((ATTENTION, "self_attn.o_proj"), (MLP, "mlp.down_proj"))
SILU = (("mlp.act_fn", "mlp.down_proj"),)
PRE_NORM = Block(
    norms=(("input_layernorm", ATTENTION), ("post_attention_layernorm", MLP)),
    activations=SILU,
    linears=LINEARS,
)
SANDWICH = Block(
    norms=(("input_layernorm", ATTENTION), ("pre_feedforward_layernorm", MLP)),
    activations=(),
    linears=LINEARS,
)
"""Gemma 2 and 3: norms on both sides, and a GELU."""

BLOCKS = {
    "LlamaDecoderLayer": PRE_NORM,
    "MistralDecoderLayer": PRE_NORM,
    "Qwen2DecoderLayer": PRE_NORM,
    "Qwen3DecoderLayer": PRE_NORM,
    "Gemma2DecoderLayer": SANDWICH,
    "Gemma3DecoderLayer": SANDWICH,
}
"""vLLM's class of a decoder layer to its parts."""

CONDITION = "ada_rms_norm_t_cond"
"""Some Mistral models modulate the norm's output; where this is set, nothing may be fused."""


@dataclass(frozen=True)
class Feed:
    """A module whose output one linear layer reads, and nothing else."""

    source: Any
    linear: Any


class DecoderLayers:
    """Notes the decoder layers of a model while its modules are put together.

    vLLM gives a plugin the linear layers one by one, never the model.
    """

    def __init__(self) -> None:
        self._layers: list[weakref.ref[nn.Module]] = []
        self._hook: Any = None

    def watch(self) -> None:
        """Start to note; once is enough."""
        if self._hook is None:
            self._hook = register_module_module_registration_hook(self._note)

    def stop(self) -> None:
        """The model is complete."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def norm_feeds(self) -> Iterator[Feed]:
        """Norms and their linear layers."""
        return self._feeds("norms")

    def activation_feeds(self) -> Iterator[Feed]:
        """Activation functions and their linear layers."""
        return self._feeds("activations")

    def linear_feeds(self) -> Iterator[Feed]:
        """Merged linear layers and those that read the last of their partitions."""
        return self._feeds("linears")

    def _note(self, parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if type(module).__name__ in BLOCKS and module is not None:
            self._layers.append(weakref.ref(module))

    def _feeds(self, kind: str) -> Iterator[Feed]:
        for reference in self._layers:
            layer = reference()
            if layer is None or getattr(layer, CONDITION, None) is not None:
                continue
            for source, linear in getattr(BLOCKS[type(layer).__name__], kind):
                yield Feed(layer.get_submodule(source), layer.get_submodule(linear))
