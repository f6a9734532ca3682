"""Run tests of Triton kernels in the interpreter, which is chosen when a kernel is defined.

Kernels therefore run in a process of their own: `run_in_interpreter` starts it, and
TRITON_INTERPRET=1 runs those tests directly.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

interpreter = pytest.mark.interpreter
in_interpreter = pytest.mark.skipif(
    not INTERPRETED,
    reason="needs TRITON_INTERPRET=1; test_in_the_interpreter runs it in a process of its own",
)
starts_the_interpreter = pytest.mark.skipif(
    INTERPRETED, reason="this is the process that it would start"
)


def run_in_interpreter(path: str) -> None:
    """All tests of a file that are marked `interpreter`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interpreter", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, path],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def error(y: Tensor, expected: Tensor) -> float:
    """|y - expected| / |expected|; NaN if anything is."""
    return float((y.float() - expected).norm() / expected.norm())
