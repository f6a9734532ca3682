"""The KV cache example: calibrates, serves, and says what that holds and costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.engines import ENVIRONMENT, ROOT

pytestmark = pytest.mark.engine

ROW = re.compile(r"^  (16 bits|INT4) +([\d,]+) +([\d.]+)$", re.MULTILINE)
PERPLEXITY_LOSS = 0.01
"""Of 4 bits on 4,096 tokens: 0.4 to 0.6 % was seen."""


def test_it_calibrates_and_serves(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "examples.int4_kv", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
    )

    assert done.returncode == 0, done.stderr
    rows = {
        name: (int(tokens.replace(",", "")), float(p))
        for name, tokens, p in ROW.findall(done.stdout)
    }
    assert rows["INT4"][0] > 3.4 * rows["16 bits"][0]
    assert rows["INT4"][1] == pytest.approx(rows["16 bits"][1], rel=PERPLEXITY_LOSS)
    assert (tmp_path / "kv_cache" / "kv_int4.safetensors").is_file()
