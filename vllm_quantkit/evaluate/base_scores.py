"""The 16-bit model's log-probabilities on disk: measured once, compared with many models.

So that two models need not be in memory together, and a later run starts where one ended.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_quantkit.cache import cache_folder
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.evaluate.window_scores import STORED
from vllm_quantkit.evaluate.windows import Windows
from vllm_quantkit.one_step import write_in_one_step
from vllm_quantkit.quantize.hub import model_folder
from vllm_quantkit.quantize.output.disk import lock_folder

RECORD = "base.json"
"""What the folder's scores depend on."""

SPARE = 1 << 28
"""Bytes that stay free beside the scores: logs and reports want some."""


@dataclass(frozen=True)
class BaseScores:
    """ln p of every position of some windows, in a folder.

    Attributes:
        folder: one file for each window, float32 [T - 1, V].
        windows: the text.
        backend: what ran the model, with its version.
    """

    folder: Path
    windows: Windows
    backend: str

    def path(self, index: int) -> Path:
        """The file of a window."""
        return self.folder / f"window-{index:05d}.f32"

    def missing(self) -> list[int]:
        """Windows that have no file yet."""
        return [i for i in range(len(self.windows.rows)) if not self.path(i).is_file()]


def fingerprint(spec: EngineSpec, windows: Windows, backend: str) -> dict[str, Any]:
    """All that decides the scores, as JSON.

    Weights count by the headers, sizes and times of their files: hashing them takes minutes.
    """
    return {
        "model": _model_digests(model_folder(spec.model)),
        "spec": json.loads(json.dumps({**asdict(spec), "model": ""}, default=str)),
        "windows": windows.fingerprint,
        "backend": backend,
        "torch": importlib.metadata.version("torch"),
    }


def default_folder(record: dict[str, Any]) -> Path:
    """Where scores of this fingerprint are looked for, and kept."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return cache_folder("base-scores", digest[:24])


@contextmanager
def claimed(folder: Path, record: dict[str, Any]) -> Iterator[None]:
    """The folder, for scores of this fingerprint and for this process alone.

    Raises:
        CheckpointError: it holds others, or another process works in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        path = folder / RECORD
        if path.is_file() and _read_json(path) != record:
            raise CheckpointError(
                f"{folder} holds log-probabilities of another model, text or version: give another "
                "folder, or delete this one."
            )
        write_in_one_step(path, json.dumps(record, indent=2))
        try:
            yield
        finally:
            # An engine that was killed leaves a window that it had not finished.
            for rest in folder.glob("*.partial"):
                rest.unlink()


def check_room(scores: BaseScores, vocabulary: int) -> None:
    """Refuses to begin what the disk cannot hold.

    Raises:
        CheckpointError: names the bytes that are needed and those that are free.
    """
    rows = (len(scores.windows.rows[index]) - 1 for index in scores.missing())
    needed = sum(rows) * vocabulary * STORED.itemsize
    free = shutil.disk_usage(scores.folder).free
    if needed and needed + SPARE > free:
        raise CheckpointError(
            f"the 16-bit model's log-probabilities take {needed:,} bytes in {scores.folder}, where "
            f"{free:,} are free: make room, set QUANTKIT_CACHE to a folder on another disk, or "
            "lower --windows or --length."
        )


def vocabulary_size(model: str) -> int:
    """Entries of the vocabulary, by the model's config.json.

    Raises:
        CheckpointError: the file does not say.
    """
    path = model_folder(model) / "config.json"
    config = _read_json(path)
    for part in (config, config.get("text_config") or {}):
        if isinstance(part, dict) and isinstance(part.get("vocab_size"), int):
            return int(part["vocab_size"])
    raise CheckpointError(f"{path} has no vocab_size: give a transformers model of text.")


def _model_digests(folder: Path) -> dict[str, str]:
    """config.json by its content, each weight file by header, size and time."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: give a transformers model folder.")
    digests = {"config.json": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()}
    for path in sorted(folder.glob("*.safetensors")):
        facts = path.stat()
        digest = hashlib.sha256(f"{facts.st_size} {facts.st_mtime_ns}".encode())
        with path.open("rb") as file:
            length = file.read(8)
            digest.update(length + file.read(min(int.from_bytes(length, "little"), facts.st_size)))
        digests[path.name] = digest.hexdigest()
    return digests


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): delete it, or download the model again."
        ) from error
