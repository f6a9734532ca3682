"""What `quantkit calibrate-kv` learnt of a model's KV cache: a folder that engines read.

    kv_int4.safetensors   <attention>.k_zero_point, <attention>.k_scale   float32 [kv_heads, head]
    kv_fp8.safetensors    <attention>.k_scale, <attention>.v_scale        float32 []
    kv_cache.json         what was calibrated on what, and the errors of each layer

A key is stored in 4 bits as (k - k_zero_point) / k_scale, rotated; in E4M3 as k / k_scale. The
names are those that vLLM's own loader of cache scales knows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from vllm_quantkit._safetensors import read_file_headers
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.quantize.output.disk import DISK_FULL
from vllm_quantkit.quantize.output.safetensors_merge import flush_folder, write_file, write_json
from vllm_quantkit.quantize.output.workspace import refuse_existing
from vllm_quantkit.spec import Frozen

FOLDER = "kv_cache"
"""Inside a model's folder, a calibration is found by itself."""

INT4_FILE, FP8_FILE, SUMMARY_FILE = "kv_int4.safetensors", "kv_fp8.safetensors", "kv_cache.json"

SHIFT, SCALE, VALUE_SCALE = ".k_zero_point", ".k_scale", ".v_scale"

MAKE_ANEW = (
    "Copy the folder again, or make it anew: "
    "quantkit calibrate-kv MODEL --calibration TEXT --out FOLDER."
)

CacheDtype = Literal["int4", "auto"]
"""Of a layer's cache: 4 bits, or the model's 16."""

KeyChoice = Literal["none", "shift", "shift+scale"]
"""What is taken from keys before they are rounded: nothing, their mean, or also lambda, the spread
that keys have and queries have not."""


class KVErrors(Frozen):
    """What a format of the cache costs a layer, on held-out samples.

    Attributes:
        logits: root mean square of scale q.(k^ - k), less its mean over the keys a query sees.
        softmax: total variation between the two softmaxes, 0 to 1: the mean over queries.
        values: |V^ - V| / |V|, Frobenius norms.
        output: |O^ - O| / |O|, O = softmax V, heads side by side.
    """

    logits: float = Field(ge=0)
    softmax: float = Field(ge=0)
    values: float = Field(ge=0)
    output: float = Field(ge=0)


class KVLayerRecord(Frozen):
    """What was found of an attention layer.

    Attributes:
        name: of the attention module in the checkpoint, such as `model.layers.0.self_attn`.
        dtype: what its cache should be.
        kv_heads: heads of keys.
        head_size: dimensions of a key and of a value.
        treatment: of its keys, in 4 bits.
        uncalibrated: errors of 4 bits without any treatment.
        calibrated: errors of 4 bits with the treatment.
        fp8: errors of E4M3 with the scales.
        disagreement: how far the halves of the calibration set are apart about the treatment, in
            spreads of the keys: see `quantize.kv_cache.moments`.
        drift: how far the mean of keys moves from the earlier to the later half of positions, in
            spreads of the keys.
    """

    name: str
    dtype: CacheDtype
    kv_heads: int = Field(gt=0)
    head_size: int = Field(gt=0)
    treatment: KeyChoice
    uncalibrated: KVErrors
    calibrated: KVErrors
    fp8: KVErrors
    disagreement: float = Field(ge=0)
    drift: float = Field(ge=0)


class KVSummary(Frozen):
    """`kv_cache.json`.

    Attributes:
        format: of the file.
        version: of the format.
        model: that was calibrated: a folder's or hub name.
        source: of the text.
        samples: that calibrated.
        length: tokens in a sample, padding included.
        tokens: in them.
        held_out_tokens: that errors were measured on.
        fingerprint: SHA-256 of the calibration samples' token ids.
        key_group: dimensions that shared a scale where errors were measured.
        value_group: likewise.
        bound: a layer whose calibrated output error is beyond it keeps 16 bits.
        layers: in the order they run.
    """

    format: Literal["quantkit-kv-cache"] = "quantkit-kv-cache"
    version: Literal[1] = 1
    model: str
    source: str
    samples: int = Field(ge=1)
    length: int = Field(ge=1)
    tokens: int = Field(ge=1)
    held_out_tokens: int = Field(ge=1)
    fingerprint: str
    key_group: int
    value_group: int
    bound: float = Field(gt=0)
    layers: tuple[KVLayerRecord, ...]


@dataclass(frozen=True)
class KVLayer:
    """How the keys and values of one attention layer are stored.

    Attributes:
        record: what was found of it.
        shift: mu, float32 [kv_heads, head_size]; None is 0.
        scale: lambda > 0, float32 [kv_heads, head_size]; None is 1.
        k_scale: of E4M3 keys: what is stored is k / k_scale.
        v_scale: of E4M3 values.
    """

    record: KVLayerRecord
    shift: Tensor | None
    scale: Tensor | None
    k_scale: float
    v_scale: float

    @property
    def dtype(self) -> CacheDtype:
        """What the layer's cache should be."""
        return self.record.dtype


@dataclass(frozen=True)
class KVCalibration:
    """A model's calibration.

    Attributes:
        summary: what was calibrated, and the errors.
        layers: by the attention module's name in the checkpoint, all KV heads.
    """

    summary: KVSummary
    layers: Mapping[str, KVLayer]


def write_kv_calibration(calibration: KVCalibration, folder: Path) -> None:
    """Makes `folder` in one step; the same calibration gives the same bytes.

    Raises:
        CheckpointError: `folder` exists, or the disk is full; nothing is left then.
    """
    refuse_existing(folder)
    with _appearing(Path(os.path.abspath(folder))) as made:
        write_file(made / INT4_FILE, _int4_tensors(calibration.layers))
        write_file(made / FP8_FILE, _fp8_tensors(calibration.layers))
        write_json(made / SUMMARY_FILE, calibration.summary.model_dump(mode="json"))


def read_kv_calibration(folder: Path) -> KVCalibration:
    """The calibration in `folder`, checked.

    Raises:
        CheckpointError: a file is missing, corrupt or of another version; a tensor is missing, too
            many, misshaped, not finite or not positive. Names file, tensor, value and what to do.
    """
    summary = _read_summary(folder / SUMMARY_FILE)
    shapes = {record.name: (record.kv_heads, record.head_size) for record in summary.layers}
    shifted = [record.name for record in summary.layers if record.treatment != "none"]
    scaled = [record.name for record in summary.layers if record.treatment == "shift+scale"]
    int4 = _read_tensors(
        folder / INT4_FILE,
        {
            **{f"{name}{SHIFT}": shapes[name] for name in shifted},
            **{f"{name}{SCALE}": shapes[name] for name in scaled},
        },
    )
    endings = (SCALE, VALUE_SCALE)
    fp8 = _read_tensors(
        folder / FP8_FILE, {f"{n}{ending}": () for n in shapes for ending in endings}
    )
    layers = {
        record.name: KVLayer(
            record,
            int4.get(f"{record.name}{SHIFT}"),
            int4.get(f"{record.name}{SCALE}"),
            float(fp8[f"{record.name}{SCALE}"]),
            float(fp8[f"{record.name}{VALUE_SCALE}"]),
        )
        for record in summary.layers
    }
    return KVCalibration(summary, layers)


def _int4_tensors(layers: Mapping[str, KVLayer]) -> dict[str, Tensor]:
    tensors = {}
    for name, layer in layers.items():
        for ending, tensor in ((SHIFT, layer.shift), (SCALE, layer.scale)):
            if tensor is not None:
                tensors[f"{name}{ending}"] = tensor.detach().float().cpu()
    return tensors


def _fp8_tensors(layers: Mapping[str, KVLayer]) -> dict[str, Tensor]:
    keys = {f"{name}{SCALE}": torch.tensor(layer.k_scale) for name, layer in layers.items()}
    values = {f"{name}{VALUE_SCALE}": torch.tensor(layer.v_scale) for name, layer in layers.items()}
    return {name: scale.float() for name, scale in {**keys, **values}.items()}


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` when all of it is on the disk."""
    made = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(made, ignore_errors=True)  # of a killed process that had this number
    try:
        made.mkdir(parents=True)
        yield made
        flush_folder(made)
        made.rename(folder)
        flush_folder(folder.parent)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise CheckpointError(
            f"The disk of {folder.parent} is full: {folder.name} was not written. Make room and "
            "calibrate again, or write to another disk."
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _read_summary(path: Path) -> KVSummary:
    _refuse_missing(path)
    try:
        return KVSummary.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{path} is no calibration of a KV cache that this version reads: "
            f"{where or 'the file'}: {first['msg']} ({str(first['input'])[:80]!r}). {MAKE_ANEW}"
        ) from None


def _read_tensors(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The file's float32 tensors, which are those expected and hold what such tensors may."""
    _refuse_missing(path)
    found = read_file_headers(path)
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise CheckpointError(
                f"{path} lacks {name}, which {SUMMARY_FILE} asks for. {MAKE_ANEW}"
            )
        if name not in expected:
            raise CheckpointError(
                f"{path} holds {name}, of which {SUMMARY_FILE} knows nothing. {MAKE_ANEW}"
            )
        header = found[name]
        if header.dtype != torch.float32 or header.shape != expected[name]:
            raise CheckpointError(
                f"{path}: {name} is {header.dtype} {list(header.shape)}, but must be torch.float32 "
                f"{list(expected[name])} as {SUMMARY_FILE} says. {MAKE_ANEW}"
            )
    tensors: dict[str, Tensor] = load_file(path)
    for name, tensor in tensors.items():
        _check_values(path, name, tensor)
    return tensors


def _check_values(path: Path, name: str, tensor: Tensor) -> None:
    """Shifts are finite; scales are positive too."""
    positive = not name.endswith(SHIFT)
    bad = ~torch.isfinite(tensor)
    if positive:
        bad |= tensor <= 0
    if bool(bad.any()):
        value = float(tensor[bad].flatten()[0])
        allowed = "finite and greater than 0" if positive else "finite"
        raise CheckpointError(
            f"{path}: {name} holds {value} in {int(bad.sum())} of {tensor.numel()} places; every "
            f"value must be {allowed}. {MAKE_ANEW}"
        )


def _refuse_missing(path: Path) -> None:
    if not path.is_file():
        state = "has no" if path.parent.is_dir() else "is no folder, so it has no"
        raise CheckpointError(
            f"{path.parent} {state} {path.name}: a calibration of the KV cache has {INT4_FILE}, "
            f"{FP8_FILE} and {SUMMARY_FILE}. {MAKE_ANEW}"
        )
