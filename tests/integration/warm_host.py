"""Imports vLLM once, and forks an engine for everyone who connects: see `warm_worker`.

Importing vLLM takes longer than starting a tiny engine, and a comparison starts many.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from importlib import import_module
from typing import TextIO

from tests.integration.engine_host import SHARED
from vllm_quantkit.integration.engine_worker.operations import find_operation
from vllm_quantkit.integration.engine_worker.process import (
    answer,
    claim_stdout,
    send,
    sentence,
    start,
)


def main(path: str) -> None:
    told = claim_stdout()  # engines write to it, and nobody reads on
    for module in SHARED:
        import_module(module)
    # vLLM compiles a few of its own functions in spite of `enforce_eager`.
    import_module("torch._dynamo").config.disable = True
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        send(told, ready=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                serve(connection)
                os._exit(0)
            connection.close()


def serve(connection: socket.socket) -> None:
    """One engine: its spec is the first line."""
    with connection.makefile("r") as requests, connection.makefile("w") as answers:
        try:
            engine = start(json.loads(requests.readline()))
        except Exception as error:
            send(answers, error=sentence(error))
            return
        send(answers, ready=True)
        answer_all(engine, requests, answers)


def answer_all(engine: object, requests: TextIO, answers: TextIO) -> None:
    for line in requests:
        send(answers, **answer(engine, find_operation, json.loads(line)))


if __name__ == "__main__":
    main(sys.argv[1])
