"""Quantises a model and prints by how many bytes the process's peak grew.

python -m tests.quantize.measured_memory SMALL MODEL FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.quantize.quantized_runs import random_sets, run
from vllm_quantkit.quantize.output.report import peak_host_bytes

KEYS = {"scheme": "awq+gptq"}


def main() -> None:
    """The small model comes first: what libraries take once does not count."""
    small, model, folder = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    run(small, folder / "small", KEYS, random_sets())
    before = peak_host_bytes()
    run(model, folder / "model", KEYS, random_sets(), hidden_states="disk")
    print(peak_host_bytes() - before)


if __name__ == "__main__":
    main()
