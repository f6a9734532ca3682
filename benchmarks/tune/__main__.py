"""Measure tiles for the layers of a model, or for shapes, on this machine's GPU.

    python -m benchmarks.tune --model meta-llama/Llama-3.1-8B --kernels wna16-int4 --out tiles
    python -m benchmarks.tune --shapes 4096,14336,128 6144,4096,32 --kernels wna16-int4 --out tiles
    QUANTKIT_TUNING_DIR=tiles vllm serve ...

Every tile is compared with float32 first; one that fails, spills registers or is wrong is noted
with the reason and never timed. The others take turns as CUDA graphs, over weights that no cache
holds. Files are written after every kernel, shape and bucket of tokens: a run that is killed or out
of time is continued by the same command.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean

import torch
import triton

from benchmarks.tune.jobs import Job, Layer, jobs_of, layers_of, parse_layer
from benchmarks.tune.record import Record, RecordError, open_record
from benchmarks.tune.search import GpuLostError, tune
from quantkit_kernels.tuning import BUCKETS
from quantkit_kernels.tuning_tables import FOLDER

NO_GPU = "Tiles are measured on a GPU, but torch finds no CUDA device here; run this where it does."


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    options = _parse(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU)
        return 1
    jobs = jobs_of(options.kernels, _layers(options), options.buckets)
    options.out.mkdir(parents=True, exist_ok=True)
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    try:
        record = open_record(options.out, torch.cuda.get_device_name(), versions)
        failed = measure(record, jobs, options.out, 60 * options.budget_minutes)
    except (RecordError, GpuLostError) as error:
        print(error)
        return 1
    print(summary(record, jobs))
    print(f"Serve with {FOLDER}={options.out}")
    return 1 if failed else 0


def measure(record: Record, jobs: Sequence[Job], out: Path, seconds: float) -> int:
    """Tune on the GPU; the number of jobs that failed.

    Raises:
        GpuLostError: see there.
    """
    from benchmarks.tune.trial import Forced, GpuTrial
    from quantkit_kernels.triton_common import device_of

    end = time.monotonic() + seconds
    device = device_of(torch.empty(0, device="cuda"))
    with tempfile.TemporaryDirectory() as folder:
        force = Forced(device, Path(folder))
        return tune(
            record,
            jobs,
            lambda job: GpuTrial(job, force),
            device,
            seconds_left=lambda: end - time.monotonic(),
            save=lambda: record.save(out),
            say=lambda text: print(text, flush=True),
        )


def summary(record: Record, jobs: Sequence[Job]) -> str:
    """What was gained, by kernel."""
    gains: dict[str, list[float]] = defaultdict(list)
    for job in jobs:
        if job in record.findings:
            gains[job.product.kernel].append(record.findings[job].gain)
    return "\n".join(
        f"{kernel}: {geometric_mean(found):.3f}x as fast as the heuristic's tiles in the geometric "
        f"mean of {len(found)} jobs, {max(found):.2f}x at best"
        for kernel, found in gains.items()
    )


def _layers(options: argparse.Namespace) -> list[Layer]:
    layers = list(options.shapes)
    if options.model:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(options.model)
        layers += layers_of(config, options.group, options.tensor_parallel)
    return layers


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from benchmarks.tune.trial import KINDS

    parser = argparse.ArgumentParser(
        prog="benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="name or folder of a Hugging Face model: all its layers")
    parser.add_argument(
        "--shapes", nargs="+", type=parse_layer, default=[], metavar="N,K[,GROUP]", help="layers"
    )
    parser.add_argument(
        "--kernels",
        nargs="+",
        choices=list(KINDS),
        metavar="KERNEL",
        required=True,
        help=", ".join(KINDS),
    )
    parser.add_argument("--group", type=int, help="of the model's layers; 0 for scales per row")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that share a layer")
    parser.add_argument(
        "--buckets",
        nargs="+",
        type=int,
        choices=BUCKETS,
        default=BUCKETS,
        metavar="M",
        help="most tokens of a bucket; all buckets unless given",
    )
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="60 unless given")
    parser.add_argument("--out", type=Path, required=True, help="folder of tables and records")
    options = parser.parse_args(arguments)
    if not options.model and not options.shapes:
        parser.error("give --model, --shapes or both")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
