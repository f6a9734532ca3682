"""The folder in which a run works: killed runs go on, and nothing half-written looks finished."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from vllm_quantkit._safetensors import TensorHeader, read_file_headers
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.quantize.output.disk import disk_full, lock_folder, translate_disk_full
from vllm_quantkit.quantize.output.model_folder import ModelFolder
from vllm_quantkit.quantize.output.records import BlockRecord
from vllm_quantkit.quantize.output.safetensors_merge import (
    flush_folder,
    size_of,
    write_file,
    write_json,
)

MAX_SHARD_BYTES = 5 * 10**9
"""Of a file of weights, as in other checkpoints."""

OWN = frozenset({"lock", "blocks", "notes", "plan.json.tmp"})
"""What a run that was killed before it began may have left."""


class Workspace:
    """`<out>.partial`: the blocks done so far, and what else a run wants to keep.

    It holds `plan.json`, `lock`, `blocks/<index>.safetensors` and `.json`, `notes/<name>.json`, and
    at the end `final/`, which becomes `out` by one rename. Every file appears under its name only
    when all of it is on the disk, and a block's record only after its tensors: a block is done
    where its record is there.
    """

    def __init__(self, out: Path, lock: BinaryIO) -> None:
        """Use `create`."""
        self._out, self._folder, self._lock = out, partial_folder(out), lock

    @classmethod
    def create(cls, out: Path, plan: Mapping[str, Any], *, resume: bool) -> Self:
        """Begin, or go on with what an earlier run with the same plan left.

        Args:
            out: the result's folder.
            plan: all that decides the result, as JSON.
            resume: True goes on with `<out>.partial`, if there is one.

        Raises:
            CheckpointError: `out` exists; `<out>.partial` exists and `resume` is False, or it was
                made by another plan; another process works in it; the disk is full.
        """
        refuse_existing(out)
        folder = partial_folder(out)
        found = folder.exists()
        with translate_disk_full(folder, 0):
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder)
            workspace = cls(out, lock)
            try:
                workspace._begin(json.loads(json.dumps(plan)), found=found, resume=resume)
            except BaseException:
                lock.close()
                raise
        return workspace

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes in; the folder stays."""
        self._lock.close()

    def discard(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self._folder)
        self.close()

    @property
    def folder(self) -> Path:
        """Where it works."""
        return self._folder

    def block_done(self, index: int) -> bool:
        """True where the block's tensors and record are complete."""
        return self._record_path(index).is_file()

    def write_block(self, index: int, tensors: Mapping[str, Tensor], record: BlockRecord) -> None:
        """Keep a block's tensors, by their final names; it is done when this returns.

        Raises:
            CheckpointError: the disk is full.
        """
        self._record_path(index).unlink(missing_ok=True)
        needed = sum(size_of(tensor) for tensor in tensors.values())
        with self._appearing(self._tensor_path(index), needed) as path:
            write_file(path, tensors)
        with self._appearing(self._record_path(index), 0) as path:
            write_json(path, record.model_dump(mode="json"))

    def record(self, index: int) -> BlockRecord:
        """What was noted of a block that is done.

        Raises:
            CheckpointError: the block is not done, or its record cannot be read.
        """
        path = self._record_path(index)
        try:
            return BlockRecord.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}). Delete it and use --resume: the block is made "
                "again."
            ) from None

    def read_block(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block that is done, by their final names.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self._tensor_path(index)
        read_file_headers(path)
        tensors: dict[str, Tensor] = load_file(path)
        return tensors

    def note(self, name: str, content: Any) -> None:
        """Keep `content`, which is JSON, under `name`.

        Raises:
            CheckpointError: the disk is full.
        """
        with self._appearing(self._note_path(name), 0) as path:
            write_json(path, content)

    def load_note(self, name: str) -> Any:
        """What was kept under `name`; None where nothing was."""
        path = self._note_path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def finish(
        self,
        source: Path,
        replaced: Collection[str],
        config: Mapping[str, Any],
        extra_files: Mapping[str, str],
        *,
        check: Callable[[Path], None] = lambda folder: None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """`out` = `source` with the blocks' tensors in place of `replaced`; the workspace goes.

        Args:
            source: a transformers model folder with safetensors weights.
            replaced: names of the source's tensors that the blocks' tensors replace.
            config: keys to set in config.json.
            extra_files: path inside `out` to a text.
            check: is given the complete folder before it becomes `out`; what it raises keeps it
                from that.
            max_shard_bytes: of a file of weights, where no single tensor is larger.

        Raises:
            CheckpointError: see `ModelFolder`; the disk is full; `out` exists by now.
        """
        tensors = self.tensors()
        model = ModelFolder(source, replaced, tensors, config, extra_files, max_shard_bytes)
        final = self._folder / "final"
        shutil.rmtree(final, ignore_errors=True)
        free = shutil.disk_usage(self._folder).free
        if free < model.bytes:
            raise disk_full(self._folder, free, model.bytes)
        with translate_disk_full(self._folder, model.bytes, final):
            final.mkdir()
            model.write(final)
            check(final)
        refuse_existing(self._out)
        final.rename(self._out)
        flush_folder(self._out.parent)
        self.discard()

    def _begin(self, plan: dict[str, Any], *, found: bool, resume: bool) -> None:
        path = self._folder / "plan.json"
        if found and not resume:
            raise CheckpointError(
                f"{self._folder} exists: an earlier run was cut off. Go on with it by --resume, or "
                "delete the folder."
            )
        if path.is_file():
            _refuse_difference(json.loads(path.read_text(encoding="utf-8")), plan, self._folder)
            return
        if foreign := sorted(item.name for item in self._folder.iterdir() if item.name not in OWN):
            raise CheckpointError(
                f"{self._folder} is no folder of an earlier run: it holds {foreign[0]!r} and no "
                "plan.json. Move it away, or write to another folder."
            )
        for name in ("blocks", "notes"):
            (self._folder / name).mkdir(exist_ok=True)
        with self._appearing(path, 0) as written:
            write_json(written, plan)
        flush_folder(self._folder.parent)

    def tensors(self) -> dict[str, TensorHeader]:
        """Headers of the tensors of all blocks that are done, by their final names."""
        tensors: dict[str, TensorHeader] = {}
        for path in sorted((self._folder / "blocks").glob("*.safetensors")):
            if self.block_done(int(path.stem)):
                tensors |= read_file_headers(path)
        return tensors

    @contextmanager
    def _appearing(self, path: Path, needed: int) -> Iterator[Path]:
        """A path to write to, which becomes `path` when all of it is on the disk."""
        written = path.with_name(f"{path.name}.tmp")
        with translate_disk_full(self._folder, needed):
            yield written
            written.replace(path)
            flush_folder(path.parent)

    def _tensor_path(self, index: int) -> Path:
        return self._folder / "blocks" / f"{index:05d}.safetensors"

    def _record_path(self, index: int) -> Path:
        return self._folder / "blocks" / f"{index:05d}.json"

    def _note_path(self, name: str) -> Path:
        return self._folder / "notes" / f"{name}.json"


def partial_folder(out: Path) -> Path:
    """`<out>.partial`, beside it."""
    out = Path(os.path.abspath(out))
    return out.with_name(f"{out.name}.partial")


def refuse_existing(out: Path) -> None:
    """Nothing is overwritten.

    Raises:
        CheckpointError: `out` exists.
    """
    if out.exists():
        raise CheckpointError(f"{out} already exists: remove it, or write to another folder.")


def _refuse_difference(old: Any, new: Any, folder: Path) -> None:
    difference = _first_difference(old, new, "")
    if difference is not None:
        key, before, now = difference
        raise CheckpointError(
            f"{folder} was begun with {key} = {before}, but now {key} = {now}. Resume with the "
            "same settings and files, or delete the folder."
        )


def _first_difference(old: Any, new: Any, key: str) -> tuple[str, str, str] | None:
    """Key, old and new value of the first place in which two plans differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return None if old == new else (key, json.dumps(old), json.dumps(new))
    for name in dict.fromkeys((*old, *new)):
        inner = f"{key}.{name}" if key else name
        if name not in old or name not in new:
            before, now = (json.dumps(p[name]) if name in p else "nothing" for p in (old, new))
            return inner, before, now
        if found := _first_difference(old[name], new[name], inner):
            return found
    return None
