"""The quantisers that are compared, each in a Python of its own, asked through files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.quantizer_workers.job import Answer, Job

CACHE = Path(".cache/bench/quantizers")
VENVS = Path(".cache/bench/venvs")
LOG_LINES = 15


@dataclass(frozen=True)
class Quantizer:
    """A quantiser and where it lives.

    Attributes:
        label: as tables call it.
        worker: module that serves it.
        packages: what its environment holds, pinned; none for this one.
    """

    label: str
    worker: str
    packages: tuple[str, ...] = ()


QUANTKIT = Quantizer("quantkit", "quantkit_worker")
LLM_COMPRESSOR = Quantizer(
    "llm-compressor", "llmcompressor_worker", ("llmcompressor==0.14.0.1", "torch==2.13.0")
)
GPTQMODEL = Quantizer("GPTQModel", "gptqmodel_worker", ("gptqmodel==7.6.0", "torch==2.13.0"))
QUANTIZERS = (QUANTKIT, LLM_COMPRESSOR, GPTQMODEL)


class QuantizerError(RuntimeError):
    """A quantiser failed; the message ends with its last log lines."""


def find_python(quantizer: Quantizer) -> Path:
    """The Python that has the quantiser; its environment is made if it is missing."""
    if not quantizer.packages:
        return Path(sys.executable)
    folder = VENVS / quantizer.worker.removesuffix("_worker")
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        print(f"{quantizer.label}: installing {', '.join(quantizer.packages)}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *quantizer.packages], check=True)
        (folder / "ready").touch()
    return python


def run(quantizer: Quantizer, job: Job, *, threads: int) -> Answer:
    """Do a job in a process of its own.

    Raises:
        QuantizerError: the process failed.
    """
    shutil.rmtree(job.out, ignore_errors=True)
    out = Path(job.out).absolute()
    request, answer, log = (Path(f"{out}.{name}") for name in ("job.json", "json", "log"))
    request.parent.mkdir(parents=True, exist_ok=True)
    request.write_text(json.dumps(asdict(job)))
    module = f"benchmarks.quantizer_workers.{quantizer.worker}"
    with log.open("w") as stream:
        status = subprocess.run(
            [find_python(quantizer).absolute(), "-m", module, request, answer],
            cwd=CACHE,  # some leave logs where they run
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(Path.cwd()), **environment(threads)},
            check=False,
        ).returncode
    if status != 0:
        tail = "\n".join(log.read_text().splitlines()[-LOG_LINES:])
        raise QuantizerError(f"{quantizer.label} failed; {log} ends:\n{tail}")
    return Answer(**json.loads(answer.read_text()))


def environment(threads: int) -> dict[str, str]:
    """Equal threads for all, and no network."""
    return {
        "OMP_NUM_THREADS": str(threads),
        # GPTQModel's pool refuses to start with fewer than its two model loaders.
        "GPTQMODEL_CPU_WORKERS": str(max(2, threads)),
        "HF_HUB_OFFLINE": "1",
    }
