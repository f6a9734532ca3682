"""The process behind `benchmarks.engine.Engine`: one JSON request a line, one JSON answer."""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from itertools import chain
from typing import Any, TextIO

WARM_UP_TOKENS = 8
PROMPT_TOKENS = 16


def main() -> None:
    """Start the engine described by the first argument, then answer until input ends."""
    answers = claim_stdout()
    engine = start(json.loads(sys.argv[1]))
    send(answers, ready=True)
    operations = {
        "perplexity": _perplexity,
        "decode": _decode,
        "prefill": _prefill,
        "continue": _continue,
        "cache": _cache,
    }
    for line in sys.stdin:
        request = json.loads(line)
        send(answers, **operations[request.pop("op")](engine, **request))


def claim_stdout() -> TextIO:
    """Keep the real stdout for answers and send everything printed to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def send(answers: TextIO, /, **answer: Any) -> None:
    """One answer, one line."""
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def start(spec: dict[str, Any]) -> Any:
    """A `vllm.LLM` for the fields of an `EngineSpec`."""
    from vllm import LLM

    options = {"disable_log_stats": True, "seed": 0, **dict(spec["options"])}
    return LLM(
        spec["model"],
        quantization=spec["quantization"],
        max_model_len=spec["max_model_len"],
        **options,
    )


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


def lora_request(adapter: str | None) -> Any:
    """vLLM's request for the adapter in folder `adapter`, always under the same number."""
    from vllm.lora.request import LoRARequest

    return None if adapter is None else LoRARequest("adapter", 1, adapter)


def generate(
    engine: Any,
    prompts: list[list[int]],
    max_tokens: int,
    adapters: Sequence[str | None] | None = None,
) -> list[list[int]]:
    """Exactly `max_tokens` greedy tokens after each prompt.

    With the LoRA adapter in a folder of its own for each prompt, if they are given.
    """
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=max_tokens,
        ignore_eos=True,
        temperature=0,
        detokenize=False,
    )
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    loras = None if adapters is None else [lora_request(adapter) for adapter in adapters]
    outputs = engine.generate(requests, params, use_tqdm=False, lora_request=loras)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _perplexity(engine: Any, text: str, max_tokens: int) -> dict[str, Any]:
    length = engine.llm_engine.model_config.max_model_len - 1
    tokens = engine.get_tokenizer().encode(text, add_special_tokens=False)[:max_tokens]
    windows = [tokens[i : i + length] for i in range(0, len(tokens) - 1, length)]
    scored = score(engine, [window for window in windows if len(window) > 1])
    scores = list(chain.from_iterable(scored))
    return {"perplexity": math.exp(-sum(scores) / len(scores)), "tokens": len(scores)}


def _decode(engine: Any, batch: int, tokens: int) -> dict[str, Any]:
    prompts = [[5 + i] * PROMPT_TOKENS for i in range(batch)]

    def seconds(count: int) -> float:
        start = time.perf_counter()
        generate(engine, prompts, count)
        return time.perf_counter() - start

    seconds(WARM_UP_TOKENS)
    # The difference of two lengths leaves prefill and request handling out.
    short, full = seconds(1), seconds(tokens + 1)
    return {"tokens_per_second": batch * tokens / (full - short)}


def _prefill(engine: Any, tokens: int) -> dict[str, Any]:
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


def _continue(engine: Any, text: str, prompts: int, length: int, tokens: int) -> dict[str, Any]:
    ids = engine.get_tokenizer().encode(text, add_special_tokens=False)
    stride = (len(ids) - length) // prompts
    starts = range(0, prompts * stride, stride)
    return {"tokens": generate(engine, [ids[i : i + length] for i in starts], tokens)}


def _cache(engine: Any) -> dict[str, Any]:
    config = engine.llm_engine.vllm_config.cache_config
    return {"tokens": config.num_gpu_blocks * config.block_size}


if __name__ == "__main__":
    main()
