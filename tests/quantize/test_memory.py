"""A run holds one block, whatever the model's size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny_models import create_tiny_model

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


def test_the_peak_is_a_few_blocks(llama: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    depth = {"num_hidden_layers": 16, "num_key_value_heads": 8}
    source = create_tiny_model("llama", tmp_path / "source", **sizes, **depth)
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    command = [sys.executable, "-m", "tests.quantize.measured_memory"]
    done = subprocess.run(
        [*command, str(llama), str(source), str(tmp_path)],
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    block = 4 * (4 * 512 * 512 + 3 * 512 * 2048)
    sums = 4 * (3 * 512 * 512 + 2048 * 2048)
    # A block in float32, its sums, and temporaries of rounding: float64 copies of its largest sum
    # and float32 copies of its largest layers, about two blocks.
    assert grown < 3 * block + 3 * sums < 2 * weights, f"{grown / MIB:.0f} MiB"
