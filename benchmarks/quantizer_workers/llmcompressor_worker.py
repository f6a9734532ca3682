"""llm-compressor's side of a comparison; run by a Python that has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quantizer_workers.job import Job, serve

IGNORED = ["lm_head"]


def main() -> None:
    """Serve one job."""
    if not torch.accelerator.is_available():
        # AWQModifier pins memory for copies to a GPU and stops where there is none (0.14.0.1).
        IntermediatesCache.pin_memory = lambda *_: None
    serve(prepare)


def prepare(job: Job) -> Callable[[], None]:
    """Load the model and the calibration tokens.

    Options: `dtype` of the loaded weights, `batch_size`, `actorder`, `damping`, `duo_scaling`,
    `strength` of SmoothQuant's smoothing, `rounding` of its weights and AWQ's (`rtn`, `gptq`).
    """
    options = job.options
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=options.get("dtype", "auto"))
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    modifiers = recipe(job)
    ids = load_file(job.calibration)["input_ids"]
    batches = ids.split(options.get("batch_size", 1))
    needs_tokens = any(modifier.requires_calibration_data for modifier in modifiers)

    def work() -> None:
        if needs_tokens:
            loader = DataLoader([{"input_ids": batch} for batch in batches], batch_size=None)
            oneshot(
                model=model,
                dataset=loader,
                recipe=modifiers,
                num_calibration_samples=len(ids),
                max_seq_length=ids.shape[1],
            )
        else:
            oneshot(model=model, recipe=modifiers)
        model.save_pretrained(job.out, save_compressed=True)
        tokenizer.save_pretrained(job.out)

    return work


def recipe(job: Job) -> list[Any]:
    """The modifiers of a job, in llm-compressor's own defaults unless an option says otherwise."""
    options = job.options
    rounding = options.get("rounding", "gptq" if job.algorithm == "gptq" else "rtn")
    groups = {"group": {"targets": ["Linear"], **scheme(job)}}
    modifiers: list[Any] = []
    if job.algorithm == "awq":
        modifiers.append(AWQModifier(duo_scaling=options.get("duo_scaling", True)))
    if job.algorithm == "smoothquant":
        modifiers.append(SmoothQuantModifier(smoothing_strength=options.get("strength", 0.5)))
    if rounding == "gptq":
        known = {"actorder": "actorder", "damping": "dampening_frac"}
        chosen = {known[name]: value for name, value in options.items() if name in known}
        modifiers.append(GPTQModifier(config_groups=groups, ignore=IGNORED, **chosen))
    else:
        modifiers.append(QuantizationModifier(config_groups=groups, ignore=IGNORED))
    return modifiers


def scheme(job: Job) -> dict[str, Any]:
    """Weights and activations as llm-compressor describes them."""
    if job.algorithm in ("smoothquant", "fp8"):
        kind = "float" if job.algorithm == "fp8" else "int"
        eight = {"num_bits": 8, "type": kind, "symmetric": True}
        return {
            "weights": {**eight, "strategy": "channel", **observer(job)},
            "input_activations": {**eight, "strategy": "token", "dynamic": True},
        }
    return {
        "weights": {
            "num_bits": job.bits,
            "type": "int",
            "symmetric": job.symmetric,
            "strategy": "group",
            "group_size": job.group_size,
            **observer(job),
        }
    }


def observer(job: Job) -> dict[str, Any]:
    """What chooses the scales of weights, where an option names it (`minmax`, `mse`)."""
    return {"observer": job.options["observer"]} if "observer" in job.options else {}


if __name__ == "__main__":
    main()
