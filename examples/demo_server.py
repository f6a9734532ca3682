"""`vllm serve` as a child process that is asked over HTTP and always stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai import OpenAI

START_LIMIT_S = 600
STOP_LIMIT_S = 30
NAME = "demo"
QUESTION = "Explain foreign keys in SQLite."
PROMPT = "The database server"
TEMPERATURE = 0.7  # greedy text of a small model soon repeats itself


class ServerError(RuntimeError):
    """The server died, or did not become healthy in time; ends with its last log lines."""


class Server:
    """A running `vllm serve`; a context manager that leaves nothing running."""

    def __init__(
        self,
        model: str,
        quantization: str,
        max_model_len: int,
        log: Path,
        progress: Callable[[str], None],
    ) -> None:
        self._log, self._progress = log, progress
        self._port = _free_port()
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            str(Path(sys.executable).with_name("vllm")), "serve", model,
            "--quantization", quantization, "--max-model-len", str(max_model_len),
            "--host", "127.0.0.1", "--port", str(self._port), "--served-model-name", NAME,
        ]  # fmt: skip
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
        with log.open("w") as output:
            # A session of its own, so that stopping reaches the engine's processes too.
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )

    @property
    def address(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._port}"

    def ask(self) -> Iterator[tuple[str, str]]:
        """A chat and a completion through the OpenAI client, as (question, answer).

        Raises:
            ServerError: the server refused a request it should serve.
        """
        from openai import APIError, BadRequestError, OpenAI

        client = OpenAI(base_url=f"{self.address}/v1", api_key="none")
        try:
            yield f"chat> {QUESTION}", self._chat(client)
        except BadRequestError as error:
            if "chat template" not in str(error):
                raise ServerError(f"the chat was refused: {error}") from error
            self._progress("this model has no chat template; asking for a completion only.")
        try:
            text = client.completions.create(
                model=NAME, prompt=PROMPT, max_tokens=48, temperature=TEMPERATURE, seed=0
            )
        except APIError as error:
            raise ServerError(f"the completion was refused: {error}") from error
        yield f"completion> {PROMPT} ...", text.choices[0].text

    def _chat(self, client: OpenAI) -> str:
        answer = client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=64,
            temperature=TEMPERATURE,
            seed=0,
        )
        return answer.choices[0].message.content or ""

    def __enter__(self) -> Server:
        try:
            self._wait_until_healthy()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _wait_until_healthy(self) -> None:
        start = told = time.monotonic()
        while not self._healthy():
            now = time.monotonic()
            if self._process.poll() is not None:
                raise ServerError(f"vllm serve stopped; {self._tail()}")
            if now - start > START_LIMIT_S:
                raise ServerError(f"no answer after {START_LIMIT_S} s; {self._tail()}")
            if now - told > 10:
                self._progress(f"waiting for the server ({now - start:.0f} s) ...")
                told = now
            time.sleep(0.5)
        self._progress(f"healthy after {time.monotonic() - start:.0f} s.")

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=2) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False

    def _stop(self) -> None:
        for signal_number in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, signal_number)
            except ProcessLookupError:
                return
            try:
                self._process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._progress("the server does not stop; killing it ...")

    def _tail(self) -> str:
        return f"{self._log} ends:\n" + "\n".join(self._log.read_text().splitlines()[-20:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
