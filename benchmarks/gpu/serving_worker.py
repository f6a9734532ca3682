"""The process behind an engine of `benchmarks.gpu.serving`: random weights, prompts of token ids.

It registers the plugin itself, so that nothing has to be installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm_quantkit.integration.engine_worker.operations import find_operation
from vllm_quantkit.integration.engine_worker.process import serve

CODES = ("qweight", "weight", "weight_packed")
"""Names of parameters that hold codes, in all dialects served here."""

FINITE = -0x40404041
"""0xBFBFBFBF: any bits less these masked ones are four finite numbers in E4M3."""


def main() -> None:
    """Start the engine described by the first argument, then answer until input ends."""
    from vllm_quantkit.plugin import register

    register()
    fill_codes_at_random()
    serve(find_operation)


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


if __name__ == "__main__":
    main()
