"""A vLLM engine in a process of its own, asked over a pipe, so that engines can be interleaved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker is the engine's only process
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

FOREVER = threading.TIMEOUT_MAX


@dataclass(frozen=True)
class EngineSpec:
    """Which model to serve, and how.

    Attributes:
        model: folder or hub name.
        quantization: as given to `--quantization`; None lets vLLM decide.
        max_model_len: longest sequence.
        options: further arguments of `vllm.LLM`.
    """

    model: str
    quantization: str | None = None
    max_model_len: int = 512
    options: tuple[tuple[str, Any], ...] = ()


class EngineError(RuntimeError):
    """An engine died or refused; the message ends with its last log lines."""


class Engine:
    """A running engine; a context manager that leaves no process behind.

    Args:
        spec: what it serves.
        log: where its process writes.
        start_seconds: after them, an engine that does not run is killed.

    Raises:
        EngineError: it refused, or did not start in time.
    """

    WORKER: ClassVar[str] = "benchmarks.engine_worker"

    def __init__(self, spec: EngineSpec, log: Path, start_seconds: float = FOREVER) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", self.WORKER, json.dumps(spec.__dict__)]
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**ENVIRONMENT, **os.environ},
            )
        watch = threading.Timer(start_seconds, self._process.kill)
        watch.start()
        try:
            self._read()  # the worker says when it is ready
        except EngineError:
            self.__exit__(None, None, None)
            raise
        finally:
            watch.cancel()

    def perplexity(self, text: str, max_tokens: int) -> tuple[float, int]:
        """exp(mean negative log-likelihood) of `text`, and the number of tokens scored."""
        answer = self._ask(op="perplexity", text=text, max_tokens=max_tokens)
        return answer["perplexity"], answer["tokens"]

    def decode_speed(self, batch: int, tokens: int) -> float:
        """Tokens per second of one timed run, all sequences together."""
        return float(self._ask(op="decode", batch=batch, tokens=tokens)["tokens_per_second"])

    def prefill_speed(self, tokens: int) -> float:
        """Tokens per second of one prompt of so many tokens, which no cache holds."""
        return float(self._ask(op="prefill", tokens=tokens)["tokens_per_second"])

    def continuations(self, text: str, prompts: int, length: int, tokens: int) -> list[list[int]]:
        """Greedy `tokens` behind each of `prompts` windows of `length` tokens of `text`."""
        answer = self._ask(op="continue", text=text, prompts=prompts, length=length, tokens=tokens)
        found: list[list[int]] = answer["tokens"]
        return found

    def cache_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return int(self._ask(op="cache")["tokens"])

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            tail = self._log.read_text().splitlines()[-15:]
            raise EngineError(f"the engine stopped; {self._log} ends:\n" + "\n".join(tail))
        answer: dict[str, Any] = json.loads(line)
        return answer
