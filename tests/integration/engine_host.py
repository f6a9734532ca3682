"""A process that imports vLLM once and forks a child for every engine asked for.

Importing vLLM takes longer than starting a tiny engine, and two engines in one process disturb
each other. One JSON job a line on stdin, one JSON result a line on stdout.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

from benchmarks.engine_worker import claim_stdout, generate, score, send, start


def main() -> None:
    answers = claim_stdout()
    import vllm  # noqa: F401 - shared by the children

    send(answers, ready=True)
    for line in sys.stdin:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            with os.fdopen(write, "w") as result:
                json.dump(run(json.loads(line)), result)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as result:
            text = result.read()
        _, status = os.waitpid(pid, 0)
        send(answers, **(json.loads(text) if text else {"error": f"engine died: {status}"}))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Start an engine, ask it, and return answers and what quantkit logged."""
    log = record_log()
    os.environ.update(job["env"])
    try:
        engine = start(job["spec"])
        answers = [OPERATIONS[ask.pop("op")](engine, **ask) for ask in job["asks"]]
    except Exception as error:  # the test decides whether it was expected
        return {"error": f"{type(error).__name__}: {error}", "log": log}
    return {"answers": answers, "log": log}


def record_log() -> list[str]:
    """A list that grows with every record of quantkit's loggers."""
    lines: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname}: {record.getMessage()}")

    logger = logging.getLogger("vllm.quantkit")
    logger.addHandler(Recorder())
    logger.setLevel(logging.INFO)
    return lines


def reload_weights(engine: Any) -> None:
    engine.collective_rpc("reload_weights")


OPERATIONS = {"score": score, "generate": generate, "reload": reload_weights}

if __name__ == "__main__":
    main()
