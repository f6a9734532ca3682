"""A vLLM engine in a process of its own, asked over a pipe, so that engines can be interleaved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from vllm_quantkit.errors import QuantkitError

ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker is the engine's only process
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

FOREVER = threading.TIMEOUT_MAX

CLOSING_SECONDS = 20
"""For an engine to end by itself when nobody asks it any more."""

TAIL = 15
"""Lines of an engine's log that an error quotes."""


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


class EngineError(QuantkitError):
    """An engine refused, failed or died; says why, or ends with its last log lines."""


class Engine:
    """A running engine; a context manager that leaves no process behind.

    Args:
        spec: what it serves.
        log: where its process writes.
        start_seconds: after them, an engine that does not run is killed.

    Raises:
        EngineError: it refused, or did not start in time.
    """

    WORKER: ClassVar[str] = "vllm_quantkit.integration.engine_worker"

    def __init__(self, spec: EngineSpec, log: Path, start_seconds: float = FOREVER) -> None:
        self.spec = spec
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.WORKER, json.dumps(asdict(spec))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**ENVIRONMENT, **os.environ},
                # Ctrl-C is for whoever asks; an engine and its ranks are ended together.
                start_new_session=True,
            )
        watch = threading.Timer(start_seconds, self._kill)
        watch.start()
        try:
            self._read()  # the worker says when it is ready
        except BaseException:
            self._end(at_once=True)
            raise
        finally:
            watch.cancel()

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """The answer of one of the worker's operations.

        Raises:
            EngineError: it failed, or the engine died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **request}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self._read()

    def perplexity(self, text: str, max_tokens: int) -> tuple[float, int]:
        """exp(mean negative log-likelihood) of `text`, and the number of tokens scored."""
        answer = self.ask("perplexity", text=text, max_tokens=max_tokens)
        return answer["perplexity"], answer["tokens"]

    def continuations(self, text: str, prompts: int, length: int, tokens: int) -> list[list[int]]:
        """Greedy `tokens` behind each of `prompts` windows of `length` tokens of `text`."""
        answer = self.ask("continue", text=text, prompts=prompts, length=length, tokens=tokens)
        found: list[list[int]] = answer["tokens"]
        return found

    def cache_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return int(self.ask("cache")["tokens"])

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end(at_once=kind is not None)

    def _end(self, *, at_once: bool) -> None:
        """Let the process end, or kill it where it is in the middle of something or stays."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if at_once:
            self._kill()
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=CLOSING_SECONDS)
        self._kill()
        self._process.wait()
        self._process.stdout.close()

    def _kill(self) -> None:
        """End the engine and its ranks, which are one group of processes, as far as they run."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{answer['error']} (the engine's log: {self._log})")
        return answer

    def _died(self) -> EngineError:
        self._process.wait()
        tail = self._log.read_text(errors="replace").splitlines()[-TAIL:]
        return EngineError(f"the engine stopped; {self._log} ends:\n" + "\n".join(tail))
