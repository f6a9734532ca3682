"""What an engine holds."""

from __future__ import annotations

from typing import Any


def cache(engine: Any) -> dict[str, int]:
    """Tokens that the KV cache holds."""
    config = engine.llm_engine.vllm_config.cache_config
    return {"tokens": config.num_gpu_blocks * config.block_size}
