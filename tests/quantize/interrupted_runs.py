"""Kills runs of the quantiser, one in each phase of each block, as an operating system would.

python -m tests.quantize.interrupted_runs MODEL FOLDER

Each run is a process of its own, made by fork: imports are paid once. Prints one line for each run:
the phase, how often the phase had begun, and the folder that the run should have written.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.quantize.quantized_runs import random_sets, run
from vllm_quantkit.quantize.progress import Silent, Tick

KEYS = {"scheme": "awq+gptq", "group_size": 32}

PHASES = (
    ("enter", 1),
    ("observe", 1),
    ("transform", 2),
    ("round", 1),
    ("round", 2),
    ("write", 2),
    ("advance", 3),
    ("measure", 1),
    ("assemble", 1),
)
"""Phase, and how often it has begun when the process dies, in a model of two blocks."""


class Killer(Silent):
    """Kills the process after the first step of a phase that begins for the n-th time."""

    def __init__(self, name: str, count: int) -> None:
        self._name, self._left = name, count

    @contextmanager
    def phase(self, name: str, steps: int) -> Iterator[Tick]:
        """Kills after the first step."""
        self._left -= name == self._name
        yield self._kill if name == self._name and not self._left else _go_on

    @staticmethod
    def _kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def kill_in(phase: str, count: int, source: Path, out: Path) -> None:
    """A run that dies in a phase; returns when it is dead."""
    child = os.fork()
    if child == 0:
        run(source, out, KEYS, random_sets(), watcher=Killer(phase, count), hidden_states="disk")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the run lived through {phase}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def _go_on() -> None:
    pass


def main() -> None:
    """Runs and kills."""
    source, folder = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    for phase, count in PHASES:
        out = folder / f"{phase}-{count}"
        kill_in(phase, count, source, out)
        print(phase, count, out)


if __name__ == "__main__":
    main()
