"""The loop of an engine's process, and how its engine is made."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from pydantic import ValidationError

Operations = Callable[[str], Callable[..., dict[str, Any]]]
"""Name of an operation to the function that answers."""


def serve(find: Operations) -> None:
    """Start the engine described by the first argument, then answer until input ends.

    What fails is answered with `error`, one sentence; the traceback is in the log.
    """
    answers = claim_stdout()
    try:
        engine = start(json.loads(sys.argv[1]))
    except Exception as error:  # whoever asked is told, and decides
        traceback.print_exc()
        send(answers, error=sentence(error))
        sys.exit(1)
    send(answers, ready=True)
    for line in sys.stdin:
        send(answers, **answer(engine, find, json.loads(line)))


def answer(engine: Any, find: Operations, request: dict[str, Any]) -> dict[str, Any]:
    """What the request's operation answers, or `error`."""
    try:
        return find(request.pop("op"))(engine, **request)
    except Exception as error:  # whoever asked is told, and decides
        traceback.print_exc()
        return {"error": sentence(error)}


def sentence(error: Exception) -> str:
    """What an error says; of pydantic's, what the first validator said."""
    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    return str(error) or type(error).__name__


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
