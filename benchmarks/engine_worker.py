"""The process behind `benchmarks.engine.Engine`: one JSON request a line, one JSON answer."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from typing import Any, TextIO

WARM_UP_TOKENS = 8
PROMPT = 16


def main() -> None:
    """Start the engine described by the first argument, then answer until input ends."""
    answers = _claim_stdout()
    spec = json.loads(sys.argv[1])
    engine = _start(spec)
    _answer(answers, ready=True)
    operations = {"perplexity": _perplexity, "decode": _decode}
    for line in sys.stdin:
        request = json.loads(line)
        _answer(answers, **operations[request.pop("op")](engine, **request))


def _claim_stdout() -> TextIO:
    """Keep the real stdout for answers and send everything printed to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _answer(answers: TextIO, **answer: Any) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _start(spec: dict[str, Any]) -> Any:
    from vllm import LLM

    options = {"disable_log_stats": True, "seed": 0, **dict(spec["options"])}
    return LLM(
        spec["model"],
        quantization=spec["quantization"],
        max_model_len=spec["max_model_len"],
        **options,
    )


def _perplexity(engine: Any, text: str, max_tokens: int) -> dict[str, Any]:
    from vllm import SamplingParams

    length = engine.llm_engine.model_config.max_model_len - 1
    tokens = engine.get_tokenizer().encode(text, add_special_tokens=False)[:max_tokens]
    windows = [tokens[i : i + length] for i in range(0, len(tokens) - 1, length)]
    prompts = [{"prompt_token_ids": window} for window in windows if len(window) > 1]
    outputs = engine.generate(
        prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
    )
    scores = [
        position[token].logprob
        for output in outputs
        for token, position in zip(
            output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
        )
    ]
    return {"perplexity": math.exp(-sum(scores) / len(scores)), "tokens": len(scores)}


def _decode(engine: Any, batch: int, tokens: int) -> dict[str, Any]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [5 + i] * PROMPT} for i in range(batch)]

    def run(count: int) -> float:
        params = SamplingParams(
            max_tokens=count, min_tokens=count, ignore_eos=True, temperature=0, detokenize=False
        )
        start = time.perf_counter()
        engine.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    run(WARM_UP_TOKENS)
    # The difference of two lengths leaves prefill and request handling out.
    short, full = run(1), run(tokens + 1)
    return {"tokens_per_second": batch * tokens / (full - short)}


if __name__ == "__main__":
    main()
