"""Text that an engine writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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


def continue_text(
    engine: Any, text: str, prompts: int, length: int, tokens: int
) -> dict[str, list[list[int]]]:
    """Greedy `tokens` behind each of `prompts` windows of `length` tokens of `text`."""
    ids = engine.get_tokenizer().encode(text, add_special_tokens=False)
    stride = (len(ids) - length) // prompts
    starts = range(0, prompts * stride, stride)
    return {"tokens": generate(engine, [ids[i : i + length] for i in starts], tokens)}


def write_texts(
    engine: Any,
    prompts: list[list[int]],
    tokens: int,
    seeds: list[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    ends: bool = False,
    batch: int | None = None,
) -> dict[str, Any]:
    """At most `tokens` tokens after each prompt, and whether the model ended there by itself.

    Args:
        engine: a `vllm.LLM`.
        prompts: token ids.
        tokens: of a continuation.
        seeds: of each prompt's sampling.
        temperature: 0 takes the most likely token.
        top_p: share of probability that is sampled from.
        ends: True where the end-of-text token, which is then a continuation's last, ends it.
        batch: prompts that are continued together; None for all.
    """
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=tokens,
            ignore_eos=not ends,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            detokenize=False,
        )
        for seed in seeds
    ]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    size = batch or len(prompts)
    outputs = [
        output.outputs[0]
        for start in range(0, len(prompts), size)
        for output in engine.generate(
            requests[start : start + size], params[start : start + size], use_tqdm=False
        )
    ]
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "ended": [output.finish_reason == "stop" for output in outputs],
    }
