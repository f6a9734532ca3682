"""Real engines for tests: one host process, one forked child for each engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # tiny models gain nothing from more, and lose much on a busy machine
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONPATH": str(ROOT),
}


TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
"""Environment of an engine of two ranks, a core each."""


@dataclass(frozen=True)
class EngineResult:
    """What an engine answered, in the order asked, and what quantkit logged."""

    answers: list[Any]
    log: list[str]


class EngineFailed(Exception):  # noqa: N818
    """The engine raised; the message is `Type: text` of its exception."""


class EngineHost:
    """Starts engines in the host process."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.engine_host"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
        )
        self._read()

    def run(
        self,
        model: Path | str,
        quantization: str | None,
        asks: list[dict[str, Any]],
        *,
        env: dict[str, str] | None = None,
        max_model_len: int = 256,
        **options: Any,
    ) -> EngineResult:
        """Start an engine, ask it everything, stop it.

        Raises:
            EngineFailed: the engine could not start or answer.
        """
        defaults = {"enforce_eager": True, "dtype": "float32"}
        spec = {
            "model": str(model),
            "quantization": quantization,
            "max_model_len": max_model_len,
            "options": list({**defaults, **options}.items()),
        }
        self._send({"spec": spec, "asks": asks, "env": env or {}})
        result = self._read()
        if "error" in result:
            raise EngineFailed(result["error"])
        return EngineResult(result["answers"], result["log"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def _send(self, job: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the engine host died; see {self._log.name}"
        result: dict[str, Any] = json.loads(line)
        return result
