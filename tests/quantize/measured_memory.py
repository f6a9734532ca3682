"""Quantises two models and prints how many bytes more the deeper one took at its peak.

python -m tests.quantize.measured_memory SHALLOW DEEP FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.quantize.quantized_runs import random_sets, run
from vllm_quantkit.quantize.output.report import peak_host_bytes

KEYS = {"scheme": "gptq"}


def main() -> None:
    """The shallow model comes first: what it takes, a deep one may take too."""
    shallow, deep, folder = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    run(shallow, folder / "shallow", KEYS, random_sets(), hidden_states="disk")
    before = peak_host_bytes()
    run(deep, folder / "deep", KEYS, random_sets(), hidden_states="disk")
    print(peak_host_bytes() - before)


if __name__ == "__main__":
    main()
