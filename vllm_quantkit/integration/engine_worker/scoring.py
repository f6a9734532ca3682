"""Log-probabilities of given text."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

from vllm_quantkit.integration.engine_worker.generation import lora_request


def score(engine: Any, prompts: list[list[int]], adapter: str | None = None) -> list[list[float]]:
    """log p(token | tokens before it) for every token but the first of each prompt.

    With the LoRA adapter in folder `adapter`, if one is given.
    """
    from vllm import SamplingParams

    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
        use_tqdm=False,
        lora_request=lora_request(adapter),
    )
    return [
        [
            position[token].logprob
            for token, position in zip(
                output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
            )
        ]
        for output in outputs
    ]


def perplexity(engine: Any, text: str, max_tokens: int) -> dict[str, Any]:
    """exp(mean negative log-likelihood) of the first `max_tokens` of `text`, in windows."""
    length = engine.llm_engine.model_config.max_model_len - 1
    tokens = engine.get_tokenizer().encode(text, add_special_tokens=False)[:max_tokens]
    windows = [tokens[i : i + length] for i in range(0, len(tokens) - 1, length)]
    scored = score(engine, [window for window in windows if len(window) > 1])
    scores = list(chain.from_iterable(scored))
    return {"perplexity": math.exp(-sum(scores) / len(scores)), "tokens": len(scores)}
