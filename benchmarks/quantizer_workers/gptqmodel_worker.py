"""GPTQModel's side of a comparison; run by a Python that has it."""

from __future__ import annotations

from collections.abc import Callable

from gptqmodel import GPTQModel
from gptqmodel.quantization.config import AWQConfig, BaseQuantizeConfig, GPTQConfig, RTNConfig
from safetensors.torch import load_file

from benchmarks.quantizer_workers.job import Job, serve


def main() -> None:
    """Serve one job."""
    serve(prepare)


def prepare(job: Job) -> Callable[[], None]:
    """Load the model and the calibration tokens.

    Options: `batch_size`, `dtype` of the loaded weights, and any of the quantiser's own config.
    """
    options = dict(job.options)
    batch_size = options.pop("batch_size", 1)
    dtype = options.pop("dtype", "auto")
    ids = load_file(job.calibration)["input_ids"]
    rows = [{"input_ids": row, "attention_mask": row.new_ones(row.shape)} for row in ids]
    model = GPTQModel.load(job.model, config(job, options), device="cpu", dtype=dtype)

    def work() -> None:
        model.quantize(rows, batch_size=batch_size)
        model.save(job.out)

    return work


def config(job: Job, options: dict[str, object]) -> BaseQuantizeConfig:
    """The job in GPTQModel's own defaults unless an option says otherwise."""
    kind = {"gptq": GPTQConfig, "awq": AWQConfig, "rtn": RTNConfig}[job.algorithm]
    return kind(bits=job.bits, group_size=job.group_size, sym=job.symmetric, **options)


if __name__ == "__main__":
    main()
