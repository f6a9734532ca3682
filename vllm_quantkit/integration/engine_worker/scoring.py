"""Log-probabilities of given text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_quantkit.errors import CheckpointError, QuantkitError
from vllm_quantkit.evaluate.window_scores import WindowStream, open_stream
from vllm_quantkit.integration.compat import holds_prompt_logits, tap_prompt_logits
from vllm_quantkit.integration.engine_worker.generation import lora_request

SAME_FIGURE = 1e-3
"""Nats between a token's log-probability as vLLM gives it and as it is computed here, at most: both
are float32 log-softmaxes of the same logits."""


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


def score_window(
    engine: Any, tokens: list[int], base: str | None = None, keep: str | None = None
) -> dict[str, Any]:
    """Figures of `WindowScores` for a prompt's tokens, from the logits of all its positions.

    The logits stay in the process that has them: the last rank of the model's pipeline.

    Args:
        engine: a `vllm.LLM` that caches no prefixes.
        tokens: of the window.
        base: file of log-probabilities to compare with.
        keep: file that takes the model's own.

    Raises:
        QuantkitError: they cannot be read, written or compared.
    """
    engine.collective_rpc(_open_tap, args=(tokens, base, keep))
    try:
        (expected,) = score(engine, [tokens])
    finally:
        found = engine.collective_rpc(_close_tap)
    (answer,) = [each for each in found if each is not None]
    if "error" in answer:
        raise QuantkitError(answer["error"])
    _check_same(answer["losses"], expected)
    return dict(answer)


class _Tap:
    """A window's stream behind the logits of a worker's model, for one prompt."""

    def __init__(
        self, runner: Any, tokens: Sequence[int], base: str | None, keep: str | None
    ) -> None:
        self._files = ExitStack()
        self._error: Exception | None = None
        self._stream: WindowStream = self._files.enter_context(
            open_stream(tokens, base=_path(base), keep=_path(keep))
        )
        self._files.callback(tap_prompt_logits(runner, self._take))

    def close(self) -> dict[str, Any]:
        """The window's figures, or the error that kept them from being computed."""
        try:
            with self._files:
                if self._error is not None:
                    raise self._error
                return self._stream.finish().to_json()
        except (QuantkitError, OSError) as error:
            return {"error": str(error)}

    def _take(self, logits: Tensor) -> None:
        """An error waits until the prompt is done, so that the engine goes on living."""
        if self._error is not None:
            return
        try:
            self._stream.add(logits.float().log_softmax(-1))
        except (QuantkitError, OSError) as error:
            self._error = error


def _open_tap(worker: Any, tokens: list[int], base: str | None, keep: str | None) -> None:
    if holds_prompt_logits():
        worker.quantkit_tap = _Tap(worker.model_runner, tokens, base, keep)


def _close_tap(worker: Any) -> dict[str, Any] | None:
    tap = worker.__dict__.pop("quantkit_tap", None)
    return None if tap is None else dict(tap.close())


def _check_same(losses: list[float], expected: list[float]) -> None:
    """Tells that every position's logits were seen, each once and in order.

    Raises:
        CheckpointError: vLLM gives other log-probabilities.
    """
    worst = max(abs(loss + logprob) for loss, logprob in zip(losses, expected, strict=True))
    if not worst <= SAME_FIGURE:
        raise CheckpointError(
            f"vLLM's own log-probabilities differ by {worst:.3g} from those of the logits that it "
            "computed; this vLLM cannot be measured, use --backend hf."
        )


def _path(path: str | None) -> Path | None:
    return None if path is None else Path(path)
