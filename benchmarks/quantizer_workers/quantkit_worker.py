"""quantkit's side of a comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.quantizer_workers.job import Job, serve
from vllm_quantkit.quantize.calibration import TokenSet, TokenSets
from vllm_quantkit.quantize.job import run_options
from vllm_quantkit.quantize.pipeline import quantize
from vllm_quantkit.quantize.recipes.recipe_file import Recipe, make_recipe


def main() -> None:
    """Serve one job."""
    serve(prepare)


def prepare(job: Job) -> Callable[[], None]:
    """Read the calibration tokens; the model is read by the timed part, block by block.

    Options: keys of `Recipe`, and under `run` those of `RunOptions`.
    """
    sets = _token_sets(job) if job.algorithm not in ("rtn", "fp8") else None
    chosen, options = recipe(job), run_options(job.options.get("run", {}))

    def work() -> None:
        quantize(Path(job.model), Path(job.out), chosen, sets, run=options)

    return work


def recipe(job: Job) -> Recipe:
    """The job in quantkit's own defaults unless an option says otherwise."""
    keys: dict[str, Any] = {"scheme": job.algorithm}
    if job.algorithm in ("rtn", "gptq", "awq"):
        keys |= {"bits": job.bits, "group_size": job.group_size, "symmetric": job.symmetric}
    options = {name: value for name, value in job.options.items() if name != "run"}
    return make_recipe(keys | options)


def _token_sets(job: Job) -> TokenSets:
    """The calibration tokens, and one window to measure quality on, as others measure none."""
    ids = load_file(job.calibration)["input_ids"]
    calibration, held_out = (
        TokenSet(rows, None, Path(job.calibration).name) for rows in (ids, ids[:1])
    )
    return TokenSets(calibration, held_out, ())


if __name__ == "__main__":
    main()
