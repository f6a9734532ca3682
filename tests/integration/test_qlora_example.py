"""The fine-tuning example: the adapter learns its facts, and vLLM serves what was trained."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.engines import ENVIRONMENT, ROOT

pytestmark = pytest.mark.engine

STEPS = 15
LOSSES = re.compile(r"^  (with|without) the adapter +([\d.]+) +([\d.]+)$", re.MULTILINE)


def test_a_few_steps_teach_what_the_engine_then_answers(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "examples.qlora", "--out", str(tmp_path), "--steps", str(STEPS)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
    )

    assert done.returncode == 0, done.stderr
    losses = {kind: tuple(map(float, pair)) for kind, *pair in LOSSES.findall(done.stdout)}
    assert losses["with"][0] == losses["with"][1]  # all four digits that are printed
    assert losses["without"][0] == losses["without"][1]
    assert losses["with"][1] < 0.2 * losses["without"][1]
    before, after = done.stdout.split("  with the adapter\n")[:2]
    assert "lets vLLM serve quantised models." not in before
    assert "lets vLLM serve quantised models." in after
    assert (tmp_path / "adapter_model.safetensors").is_file()
