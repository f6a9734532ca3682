"""Which linear layers a decoder block has and what feeds them: the only table of model families."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_quantkit.errors import UnsupportedScheme


@dataclass(frozen=True)
class Stage:
    """Layers of a block that read the same input.

    Attributes:
        layers: their names inside the block.
        previous: the norm or linear layer whose output channels reach them through nothing that a
            scale of a channel would not pass: where AWQ folds its scales into.
    """

    layers: tuple[str, ...]
    previous: str


@dataclass(frozen=True)
class ModelMap:
    """How a causal language model is built.

    Attributes:
        blocks: name of the list of decoder blocks.
        stages: a block's linear layers, in the order they run.
        keep: linear layers outside the blocks; they stay in 16 bits.
    """

    blocks: str
    stages: tuple[Stage, ...]
    keep: tuple[str, ...] = ("lm_head",)


LLAMA = ModelMap(
    blocks="model.layers",
    stages=(
        Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
        Stage(("self_attn.o_proj",), "self_attn.v_proj"),
        Stage(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
        Stage(("mlp.down_proj",), "mlp.up_proj"),
    ),
)

MODEL_MAPS = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA}
"""A config's `model_type` to map."""


def model_map(model_type: str) -> ModelMap:
    """The map of a config's `model_type`.

    Raises:
        UnsupportedScheme: no map is known.
    """
    if model_type not in MODEL_MAPS:
        raise UnsupportedScheme(
            f"models of type {model_type!r} cannot be quantised yet, only those of type "
            f"{', '.join(sorted(MODEL_MAPS))}; a new type is one entry in {__name__}.MODEL_MAPS."
        )
    return MODEL_MAPS[model_type]
