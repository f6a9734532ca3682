"""vLLM's attention backend for an INT4 cache: its shape, and what serves a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType

from quantkit_kernels.kv_int4 import CacheLayout, KeyTreatment, Softmax, head_rotation, write
from vllm_quantkit.integration import compat

SHIFT, SCALE = "kv_shift", "kv_scale"
"""Buffers of an attention layer: what is done to its keys, see `KeyTreatment`."""

CPU_BLOCK, GPU_BLOCKS = 32, (128, 64)
"""Tokens in a kernel's block: a multiple on CPUs, one of these on GPUs."""


@dataclass(frozen=True)
class Groups:
    """Dimensions that share a scale.

    Attributes:
        key: of a key.
        value: of a value.
    """

    key: int
    value: int

    def layout(self, head_size: int, block_size: int, *, columns: bool) -> CacheLayout:
        """The cache of heads of this size; `columns` as in `CacheLayout.value_columns`."""
        return CacheLayout(head_size, block_size, self.key, self.value, columns)

    def token_bytes(self, head_size: int) -> int:
        """Bytes of a token's key and value in one KV head."""
        return self.layout(head_size, CPU_BLOCK, columns=False).token_bytes


@dataclass(frozen=True)
class LayerAttention:
    """What one attention layer computes on this rank.

    Attributes:
        heads: of queries.
        kv_heads: of keys and values.
        head_size: dimensions of each.
        softmax: scale, window and softcap.
        groups: of its cache.
        cached: True where this step's keys and values too are read from the cache.
        sinks: logits without a value, one a head, or None; filled by vLLM's loader.
    """

    heads: int
    kv_heads: int
    head_size: int
    softmax: Softmax
    groups: Groups
    cached: bool
    sinks: Tensor | None


class Int4Backend(AttentionBackend):  # type: ignore[misc]
    """A cache of `token_bytes` bytes a token and head; `kv_devices` makes one for each device."""

    groups: ClassVar[Groups]
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """For logs; the layer's `backend` stays the one that vLLM chose."""
        return "QUANTKIT_INT4"

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The layer's pages hold `token_bytes` bytes a token and head. From vLLM 0.28 on."""
        size = cls.groups.token_bytes(spec.head_size)
        return replace(spec, dtype=torch.uint8, state_content_bytes=size)

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Before vLLM 0.28; the spec's head size is half a token's bytes, see `compat`."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        """A block and head lies in one piece. From vLLM 0.28 on."""
        return compat.head_major_layouts()

    @classmethod
    def get_required_kv_cache_layout(cls) -> str:
        """Before vLLM 0.28."""
        return "HND"

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """On GPUs the larger of the kernel's blocks, where vLLM's default is none of them."""
        if cls.supports_block_size(default_block_size):
            return default_block_size
        sizes = cls.get_supported_kernel_block_sizes()
        return int(max(size if isinstance(size, int) else size.base for size in sizes))

    @staticmethod
    def use_cascade_attention(*args: Any, **kwargs: Any) -> bool:
        """No."""
        return False

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Served."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Served."""
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Everything is read from the cache then."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Refused, see `kv_refusals`."""
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders."""
        return bool(attn_type == AttentionType.DECODER)


class Int4Impl(AttentionImpl):  # type: ignore[misc]
    """One layer's attention; what CPUs and GPUs share."""

    columns: ClassVar[bool]

    def __init__(self, attention: LayerAttention) -> None:
        self.attention = attention
        self.num_heads, self.num_kv_heads = attention.heads, attention.kv_heads
        self.head_size, self.scale = attention.head_size, attention.softmax.scale
        self.on_ready: Callable[[], None] | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Tells whoever waits for the layer."""
        if self.on_ready is not None:
            self.on_ready()

    def do_kv_cache_update(
        self, layer: nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """kv_cache[slot_mapping] = quantised key and value."""
        write(key, value, kv_cache, slot_mapping, self.layout(kv_cache), treatment(layer))

    def layout(self, kv_cache: Tensor) -> CacheLayout:
        """Of the layer's cache, whose blocks vLLM has sized."""
        size, groups = self.attention.head_size, self.attention.groups
        return groups.layout(size, kv_cache.shape[2], columns=self.columns)

    def forward(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """output[T, Hq, D] = attention of query [T, Hq, D], whose keys and values are written.

        Raises:
            NotImplementedError: vLLM asks for a quantised output, which it does only where
                `fused_output_quant_supported` says so.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("the INT4 cache's attention has no quantised output")
        if attn_metadata is None:  # vLLM measures memory, or warms up
            head_rotation(self.attention.head_size, query.device)
            return output
        self.attend(layer, query, key, value, kv_cache, attn_metadata, output)
        return output

    def attend(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: Any,
        output: Tensor,
    ) -> None:
        """As `forward`, with metadata."""
        raise NotImplementedError


def treatment(layer: nn.Module) -> KeyTreatment:
    """What is done to a layer's keys before they are quantised."""
    return KeyTreatment(getattr(layer, SHIFT, None), getattr(layer, SCALE, None))
