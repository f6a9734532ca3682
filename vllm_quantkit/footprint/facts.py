"""What a model is, in sizes: the words that everything about memory speaks in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from vllm_quantkit._safetensors import TensorHeader
from vllm_quantkit.spec import Frozen, LayerShape, SchemeSpec

Parallel = Literal["column", "row", "replicated"]
"""How tensor parallelism cuts a layer: its outputs, its inputs, or not at all."""


class ModelFacts(Frozen):
    """Sizes of a causal language model, in the words of config.json.

    Attributes:
        model: folder, or name on the hub.
        architecture: first of `architectures`.
        head_dim: dimensions of a key; of a value, `value_dim`.
        max_position: longest sequence the config allows; 0 where it does not say.
        dtype: of what is not quantised: `bfloat16`, `float16` or `float32`.
        mla: True for latent attention (DeepSeek), whose cache is one latent a token.
        latent_dim: values a token and layer in such a cache; 0 without.
        experts: of a mixture, in each of its layers; 0 without.
        experts_per_token: how many of them a token runs through.
        sliding_window: tokens that a windowed layer sees; None without such layers.
        windowed_layers: layers with that window.
        attention_layers: layers that keep keys and values of their own.
        quantization_config: the checkpoint's; None for a model in 16 bits.
        parameters: weights, biases, norms and embeddings; tied ones once.
        from_headers: True where tensors were listed in files, False where config.json alone tells.
    """

    model: str
    architecture: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    vocab_size: int
    max_position: int
    dtype: str
    tied_embeddings: bool
    mla: bool = False
    latent_dim: int = 0
    experts: int = 0
    experts_per_token: int = 0
    sliding_window: int | None = None
    windowed_layers: int = 0
    attention_layers: int
    quantization_config: dict[str, Any] | None = None
    parameters: int = Field(ge=0)
    from_headers: bool = True


class LayerGroup(Frozen):
    """Linear layers that are alike in every block, as vLLM merges them.

    Attributes:
        name: of the merged layers, `*` for the number of the block and of the expert:
            `model.layers.*.mlp.gate_up_proj`.
        members: the checkpoint's names of the layers merged into the first of them.
        count: how many such merged layers the model has, over all blocks and experts.
        blocks: numbers of the blocks that have them; empty for layers outside the blocks.
        shape: of a whole merged layer.
        rank_shape: of one tensor-parallel rank's share.
        rank_rows: rows of that share in each member.
        parallel: how it is cut.
        spec: how it is stored and multiplied; None for 16 bits.
        bias: True where it has one.
        expert: True for the layers of a mixture's experts.
        head: True for the output head.
        refused: why vllm-quantkit does not serve it as asked, a sentence; empty where it does.
    """

    name: str
    members: tuple[str, ...]
    count: int = Field(gt=0)
    blocks: tuple[int, ...] = ()
    shape: LayerShape
    rank_shape: LayerShape
    rank_rows: tuple[int, ...]
    parallel: Parallel
    spec: SchemeSpec | None
    bias: bool = False
    expert: bool = False
    head: bool = False
    refused: str = ""


@dataclass(frozen=True)
class Model:
    """A model's facts, and what its files list.

    Attributes:
        facts: sizes.
        config: config.json, the part about text.
        tensors: every tensor of the checkpoint by name; without files to read, those of the model
            in 16 bits, by transformers' names.
    """

    facts: ModelFacts
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]
