"""Calibrations of a KV cache, made up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from quantkit_kernels.kv_int4 import KeyTreatment
from vllm_quantkit.kv_calibration import (
    KVCalibration,
    KVErrors,
    KVLayer,
    KVLayerRecord,
    KVSummary,
    write_kv_calibration,
)

NO_ERRORS = KVErrors(logits=0, softmax=0, values=0, output=0)


def random_treatments(*, layers: int, heads: int, head_size: int) -> dict[int, KeyTreatment]:
    """Shifts as large as keys, scales from 1/2 to 2."""
    generator = torch.Generator().manual_seed(0)

    def numbers() -> torch.Tensor:
        return torch.randn(heads, head_size, generator=generator)

    return {
        layer: KeyTreatment(numbers(), torch.exp2(numbers().clamp(-1, 1)))
        for layer in range(layers)
    }


def calibration_folder(
    folder: Path,
    treatments: Mapping[int, KeyTreatment],
    *,
    kept: tuple[int, ...] = (),
    scales: tuple[float, float] = (1.0, 1.0),
    name: str = "model.layers.{}.self_attn",
) -> Path:
    """Writes a calibration of a model whose attention modules are called `name`.

    Args:
        folder: is made.
        treatments: of each layer's keys.
        kept: layers that should keep 16 bits.
        scales: k_scale and v_scale of an FP8 cache.
        name: of a layer's attention module.
    """
    records = {
        layer: KVLayerRecord(
            name=name.format(layer),
            dtype="auto" if layer in kept else "int4",
            kv_heads=treatment.shift.shape[0],
            head_size=treatment.shift.shape[1],
            treatment="shift+scale",
            uncalibrated=NO_ERRORS,
            calibrated=NO_ERRORS,
            fp8=NO_ERRORS,
            disagreement=0,
            drift=0,
        )
        for layer, treatment in treatments.items()
    }
    summary = KVSummary(
        model="model",
        source="text",
        samples=1,
        tokens=1,
        length=1,
        held_out_tokens=1,
        fingerprint="",
        key_group=32,
        value_group=64,
        bound=1,
        layers=tuple(records.values()),
    )
    layers = {
        record.name: KVLayer(record, *treatments[layer], *scales)
        for layer, record in records.items()
    }
    write_kv_calibration(KVCalibration(summary, layers), folder)
    return folder
