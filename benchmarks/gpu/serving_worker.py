"""The process behind an engine of `benchmarks.gpu.serving`: random weights, prompts of token ids.

It registers the plugin itself, so that nothing has to be installed.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from torch import nn

from vllm_quantkit.integration.engine_worker.generation import generate
from vllm_quantkit.integration.engine_worker.process import serve

CODES = ("qweight", "weight", "weight_packed")
"""Names of parameters that hold codes, in all dialects served here."""

FINITE = -0x40404041
"""0xBFBFBFBF: any bits less these masked ones are four finite numbers in E4M3."""

TOKENS = range(4, 1000)
WARM_UP_TOKENS = 8
FEW_TOKENS = 16

Seconds = tuple[float, float]


def main() -> None:
    """Start the engine described by the first argument, then answer until input ends."""
    from vllm_quantkit.plugin import register

    register()
    fill_codes_at_random()
    serve({"decode": decode, "prefill": prefill}.__getitem__)


def fill_codes_at_random() -> None:
    """Let vLLM's dummy loader fill integers, too: it leaves them, and zeros compute faster."""
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    load = DummyModelLoader.load_weights

    def load_and_fill(loader: Any, model: nn.Module, *more: Any, **named: Any) -> None:
        load(loader, model, *more, **named)
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in CODES:
                fill(parameter.data)

    DummyModelLoader.load_weights = load_and_fill


def fill(codes: torch.Tensor) -> None:
    """Random codes in the place of integers, packed or not."""
    if codes.is_meta or codes.is_floating_point():
        return
    limits = torch.iinfo(codes.dtype)
    codes.random_(limits.min, limits.max)
    if codes.dtype == torch.int32:
        codes.bitwise_and_(FINITE)


def random_prompt(tokens: int) -> list[int]:
    """No prefix of an earlier prompt is cached."""
    return random.choices(TOKENS, k=tokens)


def decode(engine: Any, batch: int, context: int, tokens: int) -> dict[str, Seconds]:
    """Seconds for the first token of `batch` sequences, and for so many `tokens` more.

    They have `context` tokens already; the difference leaves prefill, of what is not cached, out.
    """
    prompts = [random_prompt(context) for _ in range(batch)]
    for count in (1, WARM_UP_TOKENS):
        seconds(engine, prompts, count)
    return {"seconds": (seconds(engine, prompts, 1), seconds(engine, prompts, tokens + 1))}


def prefill(engine: Any, tokens: int) -> dict[str, Seconds]:
    """Seconds for the first token behind a short prompt, and behind one of `tokens` more.

    The difference leaves request handling and the decoded token out.
    """
    many = FEW_TOKENS + tokens
    # The first, which warms up, is not counted.
    _, short, full = (seconds(engine, [random_prompt(n)], 1) for n in (many, FEW_TOKENS, many))
    return {"seconds": (short, full)}


def seconds(engine: Any, prompts: list[list[int]], count: int) -> float:
    """For `count` tokens behind each prompt."""
    begin = time.perf_counter()
    generate(engine, prompts, count)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
