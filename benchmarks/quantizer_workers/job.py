"""What every quantiser is asked to do, and how its worker answers; needs nothing but Python."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Algorithm = Literal["rtn", "gptq", "awq", "smoothquant", "fp8"]


@dataclass(frozen=True)
class Job:
    """One model to quantise.

    Attributes:
        model: folder of the 16-bit model.
        out: folder to write; does not exist.
        calibration: safetensors file with `input_ids`, int64 [S, T].
        algorithm: how weights are rounded or channels scaled. `smoothquant` has int8 weights per
            channel and int8 activations per token, `fp8` the same in E4M3.
        bits: of a weight.
        group_size: input channels that share a scale; -1 for all.
        symmetric: whether integer weights have no zero-point.
        options: of this quantiser alone, such as `actorder`.
    """

    model: str
    out: str
    calibration: str
    algorithm: Algorithm
    bits: int = 4
    group_size: int = 64
    symmetric: bool = True
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """How it went.

    Attributes:
        seconds: from the model in memory to the checkpoint on disk.
        processor_seconds: of all threads, in that time; other processes disturb it less.
    """

    seconds: float
    processor_seconds: float


def serve(prepare: Callable[[Job], Callable[[], None]]) -> None:
    """Do the job in the file that is the first argument; write the answer to the second.

    Args:
        prepare: loads a job's model and returns what quantises and writes it, which is timed.
    """
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    work = prepare(job)
    start, processor_start = time.perf_counter(), time.process_time()
    work()
    answer = Answer(time.perf_counter() - start, time.process_time() - processor_start)
    Path(sys.argv[2]).write_text(json.dumps(asdict(answer)))
