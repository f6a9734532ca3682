"""Timed runs of an engine."""

from __future__ import annotations

import random
import time
from typing import Any

from vllm_quantkit.integration.engine_worker.generation import generate

WARM_UP_TOKENS = 8
PROMPT_TOKENS = 16


def decode(engine: Any, batch: int, tokens: int) -> dict[str, float]:
    """Tokens per second of `batch` sequences together."""
    prompts = [[5 + i] * PROMPT_TOKENS for i in range(batch)]

    def seconds(count: int) -> float:
        start = time.perf_counter()
        generate(engine, prompts, count)
        return time.perf_counter() - start

    seconds(WARM_UP_TOKENS)
    # The difference of two lengths leaves prefill and request handling out.
    short, full = seconds(1), seconds(tokens + 1)
    return {"tokens_per_second": batch * tokens / (full - short)}


def prefill(engine: Any, tokens: int) -> dict[str, float]:
    """Tokens per second of one prompt that no cache holds."""

    def seconds(count: int) -> float:
        # Random tokens: no prefix of an earlier prompt is cached.
        prompt = [random.randrange(4, 2000) for _ in range(count)]
        start = time.perf_counter()
        generate(engine, [prompt], 1)
        return time.perf_counter() - start

    seconds(PROMPT_TOKENS)
    # The difference leaves request handling and the one decoded token out.
    short, full = seconds(PROMPT_TOKENS), seconds(tokens)
    return {"tokens_per_second": (tokens - PROMPT_TOKENS) / (full - short)}
