"""Bytes that a token takes in the KV cache."""

from __future__ import annotations

from typing import Literal

from quantkit_kernels.kv_int4 import CacheLayout
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.footprint.facts import ModelFacts
from vllm_quantkit.options import Options
from vllm_quantkit.schemes import SCHEMES, get_method
from vllm_quantkit.spec import Frozen

CacheNumber = Literal["auto", "fp8", "int4"]
"""How keys and values are stored: in the model's dtype, in 8-bit floats, or in 4 bits."""

WORDS: dict[str, CacheNumber] = {
    **dict.fromkeys(("auto", "bfloat16", "float16"), "auto"),
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2"), "fp8"),
    "int4_per_token_head": "int4",
}
"""Words of `--kv-cache-dtype`."""

BLOCK_TOKENS = 128
"""Tokens in a block of the 4-bit cache; its bytes a token do not depend on it."""

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class KVCache(Frozen):
    """How a model's keys and values are stored.

    Attributes:
        dtype: of most layers.
        key_group: dimensions of a key that share a scale, at 4 bits.
        value_group: the same for values.
        skip_layers: layers that keep 16 bits.
    """

    dtype: CacheNumber = "auto"
    key_group: Literal[32, 64] = 32
    value_group: Literal[32, 64] = 64
    skip_layers: tuple[int, ...] = ()

    def token_bytes(self, facts: ModelFacts, tp: int = 1, dtype: str = "bfloat16") -> int:
        """Bytes of a token on one rank, over all layers.

        Layers with a sliding window count as the others, see `sequence_bytes`.

        Args:
            facts: of the model.
            tp: tensor-parallel size.
            dtype: of the activations, in which `auto` stores.
        """
        plain = self._plain_bytes(facts, tp, dtype)
        if self.dtype != "int4":
            return facts.attention_layers * plain
        skipped = len({layer for layer in self.skip_layers if layer < facts.num_layers})
        skipped = min(skipped, facts.attention_layers)
        packed = kv_heads_of_rank(facts, tp) * self._layout(facts).token_bytes
        return (facts.attention_layers - skipped) * packed + skipped * plain

    def sequence_bytes(
        self, facts: ModelFacts, length: int, step: int, tp: int = 1, dtype: str = "bfloat16"
    ) -> int:
        """Bytes of one sequence on one rank; windowed layers keep a window, and the running step.

        Args:
            facts: of the model.
            length: tokens of the sequence.
            step: tokens that a step may add.
            tp: tensor-parallel size.
            dtype: as in `token_bytes`.
        """
        whole = length * self.token_bytes(facts, tp, dtype)
        if facts.sliding_window is None:
            return whole
        share = facts.windowed_layers / max(1, facts.attention_layers)
        kept = min(length, facts.sliding_window - 1 + step)
        return int(whole * (1 - share) + whole * share * kept / length)

    def _plain_bytes(self, facts: ModelFacts, tp: int, dtype: str) -> int:
        """Bytes of a token and layer whose values are numbers of their own."""
        item = 1 if self.dtype == "fp8" else ITEM_BYTES[dtype]
        if facts.mla:  # one latent for all heads, on every rank
            return facts.latent_dim * item
        return kv_heads_of_rank(facts, tp) * (facts.head_dim + facts.value_dim) * item

    def _layout(self, facts: ModelFacts) -> CacheLayout:
        return CacheLayout(facts.head_dim, BLOCK_TOKENS, self.key_group, self.value_group)


def kv_heads_of_rank(facts: ModelFacts, tp: int) -> int:
    """Heads of keys and values on a rank; one that several ranks share is on each of them."""
    return max(1, facts.kv_heads // tp)


def kv_cache_for(method: str | None, options: Options, kv_cache_dtype: str = "auto") -> KVCache:
    """What `--quantization`, `--additional-config` and `--kv-cache-dtype` make of the cache.

    Raises:
        ConfigError: the word is not known, or contradicts the method or the options.
    """
    if kv_cache_dtype not in WORDS:
        raise ConfigError(
            f"--kv-cache-dtype {kv_cache_dtype} is not known here; use one of {', '.join(WORDS)}."
        )
    number, given = WORDS[kv_cache_dtype], options.kv_cache
    asked = given.dtype == "int4" or (method in SCHEMES and get_method(str(method)).int4_cache)
    if asked and kv_cache_dtype != "auto" and number != "int4":
        raise ConfigError(
            f"--kv-cache-dtype {kv_cache_dtype} contradicts a KV cache of 4 bits, which method or "
            "options ask for; drop one of them."
        )
    if not asked and number != "int4":
        return KVCache(dtype=number)
    return KVCache(
        dtype="int4",
        key_group=given.key_group,
        value_group=given.value_group,
        skip_layers=given.skip_layers,
    )
