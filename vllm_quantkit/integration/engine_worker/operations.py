"""What an engine's process can be asked: the name of an operation to the function that answers."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

HERE = __name__.rpartition(".")[0]

OPERATIONS = {
    "perplexity": "scoring:perplexity",
    "score_window": "scoring:score_window",
    "decode": "speed:decode",
    "prefill": "speed:prefill",
    "first_token_under_load": "speed:first_token_under_load",
    "mixed": "speed:mixed",
    "peak": "speed:peak",
    "calibrate": "speed:calibrate",
    "continue": "generation:continue_text",
    "write_texts": "generation:write_texts",
    "cache": "facts:cache",
    "memory": "facts:memory",
    "kernels": "facts:kernels",
}
"""Name to `module:function`; a function takes the `vllm.LLM` and the request's fields."""

Operation = Callable[..., dict[str, Any]]


def find_operation(name: str) -> Operation:
    """The function behind `name`; its module is imported when it is first asked for."""
    module, _, function = OPERATIONS[name].partition(":")
    operation: Operation = getattr(import_module(f"{HERE}.{module}"), function)
    return operation
