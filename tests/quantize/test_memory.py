"""A run holds one block, however many the model has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny_models import create_tiny_model

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
HIDDEN, INTERMEDIATE = 384, 1536
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""The allocator hands every tensor back: what is measured is what is held."""

SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}


def test_more_blocks_take_no_more_memory(tmp_path: Path) -> None:
    models = [
        create_tiny_model("llama", tmp_path / f"{depth}", num_hidden_layers=depth, **SIZES)
        for depth in (2, 12)
    ]
    command = [sys.executable, "-m", "tests.quantize.measured_memory"]
    done = subprocess.run(
        [*command, *map(str, models), str(tmp_path)],
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | RETURNING,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    block = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
    # Ten more blocks.
    assert grown < 2 * block, f"{grown / MIB:.0f} MiB for 10 blocks of {block / MIB:.0f}"
