"""What feeds the linear layers of a decoder block, by model family: all that is known of models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vllm_quantkit.quantize.methods.smoothquant import Sharing
from vllm_quantkit.spec import LayerShape

SourceKind = Literal["norm", "norm_plus_one", "linear"]
"""Where scales are folded: a norm's weight w, a norm's 1 + w, the last rows of a linear layer."""

UNSHARED = Sharing(1, 1)
"""Each input channel is a channel of its own."""


@dataclass(frozen=True)
class Source:
    """The module whose output channels reach a stage through nothing that a scale would not pass.

    Attributes:
        module: its name inside the block.
        kind: where the scales go.
    """

    module: str
    kind: SourceKind


@dataclass(frozen=True)
class Stage:
    """Linear layers of a block that read the same input.

    Attributes:
        groups: their names inside the block; engines merge the layers of a group into one.
        source: where scales of the input channels are folded; None where nothing can be.
        also: modules with a `weight` [N, K] that read that input, too, and stay in 16 bits.
        observed: the module whose first input that is, for all tokens; empty for the first layer.
        sharing: which input channels are one channel of the source.
    """

    groups: tuple[tuple[str, ...], ...]
    source: Source | None
    also: tuple[str, ...] = ()
    observed: str = ""
    sharing: Sharing = UNSHARED

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers, group by group."""
        return tuple(name for group in self.groups for name in group)


@dataclass(frozen=True)
class Family:
    """How the decoder blocks of a family differ from Llama's.

    Attributes:
        norm: how the norms before attention and MLP use their weight.
        mlp_norm: the norm that the MLP reads.
    """

    norm: SourceKind = "norm"
    mlp_norm: str = "post_attention_layernorm"


GEMMA = Family(norm="norm_plus_one", mlp_norm="pre_feedforward_layernorm")

FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "phi3": Family(),
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gemma3_text": GEMMA,
    "mixtral": Family(),
    "qwen2_moe": Family(),
    "qwen3_moe": Family(),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(),
}
"""A config's `model_type` to its family."""

W_NAMES = (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
"""What Mixtral's checkpoints, and those of models made after it, call an expert's layers."""

NORM_READERS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.qkv_proj",),
    ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
)
"""Layers that read the norm before attention. The last row is DeepSeek's latent attention
(arXiv 2405.04434, section 2.1), whose q may be a `q_proj`."""

LATENTS = (
    ("self_attn.q_a_layernorm", "self_attn.q_b_proj"),
    ("self_attn.kv_a_layernorm", "self_attn.kv_b_proj"),
)
"""Norms of the compressed queries, keys and values, and their readers. The part of
`kv_a_proj_with_mqa` that carries positions passes by the norm and by its reader."""


@dataclass(frozen=True)
class Heads:
    """Attention heads of a block.

    Attributes:
        query: number of query heads.
        shared: number of key and value heads.
        width: channels of a head.
    """

    query: int
    shared: int
    width: int


@dataclass(frozen=True)
class BlockParts:
    """What a decoder block is made of; names are inside the block.

    Attributes:
        layers: linear layers that may be quantised, in module order.
        kept: other modules with a `weight` [N, K], such as routers, to their K.
        norms: modules with a `weight` [K] to K.
        heads: of its attention; None if the config does not tell.
        fused: True if it has experts in one tensor, which read what the MLP reads.
    """

    layers: Mapping[str, LayerShape]
    kept: Mapping[str, int]
    norms: Mapping[str, int]
    heads: Heads | None
    fused: bool = False


def stages_of(family: Family | None, parts: BlockParts) -> tuple[Stage, ...]:
    """The stages of a block, in the order they run; they hold every layer once.

    Args:
        family: None for an unknown architecture: each layer is a stage and has no source.
        parts: the block.
    """
    found: list[Stage] = []
    if family is not None:
        found = [*_attention(family, parts), *_feed_forward(family, parts)]
    covered = {name for stage in found for name in stage.layers}
    others = (name for name in parts.layers if name not in covered)
    return (*found, *(Stage(((name,),), None) for name in others))


def heads_of(config: Any) -> Heads | None:
    """Attention heads as the config of a language model tells them; None if it does not."""
    query = getattr(config, "num_attention_heads", None)
    if not query:
        return None
    shared = getattr(config, "num_key_value_heads", None) or query
    width = getattr(config, "head_dim", None) or config.hidden_size // query
    return Heads(int(query), int(shared), int(width))


def attention_implementation(config: Any) -> str | None:
    """The one that computes what the config says; None leaves the choice to transformers.

    PyTorch's fused attention leaves out the soft cap of attention scores (arXiv 2408.00118).
    """
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "eager" if capped else None


def expert_names(name: str) -> Iterator[str]:
    """What a checkpoint may call `name`, a parameter of one expert; nothing for other names."""
    for usual, other in W_NAMES:
        if match := re.search(rf"\.experts\.\d+\.({usual})\.", name):
            renamed = name[: match.start(1)] + other + name[match.end(1) :]
            yield renamed
            yield renamed.replace(".mlp.", ".block_sparse_moe.")


def what_unknown_loses(model_type: str) -> str:
    """What is lost where it is not known what feeds a layer."""
    return (
        f"models of type {model_type!r} are not in the table of known families, so AWQ and "
        "SmoothQuant have nothing to fold their scales into and leave its layers as they are; "
        "rounding to nearest and GPTQ work as for any model. A known family is one entry in "
        f"{__name__}.FAMILIES."
    )


def _attention(family: Family, parts: BlockParts) -> Iterator[Stage]:
    groups = _present(NORM_READERS, parts)
    if groups:
        yield Stage(groups, _norm("input_layernorm", family.norm, groups[0], parts))
    for norm, reader in LATENTS:
        if reader in parts.layers:
            yield Stage(((reader,),), _norm(norm, "norm", (reader,), parts))
    if "self_attn.o_proj" in parts.layers:
        yield _output(parts)


def _output(parts: BlockParts) -> Stage:
    """o reads each channel of v once for every query head that shares v's head."""
    groups, heads = (("self_attn.o_proj",),), parts.heads
    inputs = parts.layers["self_attn.o_proj"].in_features
    if heads is None or inputs != heads.query * heads.width or heads.query % heads.shared:
        return Stage(groups, None)
    values = heads.shared * heads.width
    rows = {"self_attn.v_proj": values, "self_attn.qkv_proj": inputs + 2 * values}
    for name, expected in rows.items():
        if name in parts.layers and parts.layers[name].out_features == expected:
            sharers = heads.query // heads.shared
            sharing = Sharing(sharers, heads.width) if sharers > 1 else UNSHARED
            return Stage(groups, Source(name, "linear"), sharing=sharing)
    return Stage(groups, None)


def _feed_forward(family: Family, parts: BlockParts) -> Iterator[Stage]:
    """One stage for all gates and ups, then one for each down: of the MLP, or of each expert."""
    prefixes = dict.fromkeys(
        name.rpartition(".")[0] for name in parts.layers if name.startswith("mlp.")
    )
    groups = _present(
        [
            group
            for prefix in prefixes
            for group in (
                (f"{prefix}.gate_proj", f"{prefix}.up_proj"),
                (f"{prefix}.gate_up_proj",),
            )
        ],
        parts,
    )
    also = tuple(name for name in parts.kept if name.startswith("mlp."))
    if groups:
        source = _norm(family.mlp_norm, family.norm, groups[0], parts)
        source = None if parts.fused else source
        yield Stage(groups, source, also, "mlp" if also else "")
    for prefix in prefixes:
        if f"{prefix}.down_proj" in parts.layers:
            yield Stage(((f"{prefix}.down_proj",),), _up(prefix, parts))


def _up(prefix: str, parts: BlockParts) -> Source | None:
    """The layer whose last rows make the channels of `act(gate) * up`."""
    inputs = parts.layers[f"{prefix}.down_proj"].in_features
    for name, rows in ((f"{prefix}.up_proj", inputs), (f"{prefix}.gate_up_proj", 2 * inputs)):
        if name in parts.layers and parts.layers[name].out_features == rows:
            return Source(name, "linear")
    return None


def _norm(name: str, kind: SourceKind, readers: Sequence[str], parts: BlockParts) -> Source | None:
    width = parts.layers[readers[0]].in_features
    return Source(name, kind) if parts.norms.get(name) == width else None


def _present(groups: Sequence[Sequence[str]], parts: BlockParts) -> tuple[tuple[str, ...], ...]:
    """The groups without the layers that the block lacks."""
    present = (tuple(name for name in group if name in parts.layers) for group in groups)
    return tuple(group for group in present if group)
