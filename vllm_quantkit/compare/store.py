"""What was made and measured, kept one file each, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vllm_quantkit.compare.digests import digest_of
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.one_step import write_in_one_step
from vllm_quantkit.quantize.output.disk import lock_folder
from vllm_quantkit.terminal import Terminal, to_json

Value = TypeVar("Value", bound=BaseModel)

Key = Mapping[str, Any]
"""All that decides what is kept, as JSON."""


@dataclass(frozen=True)
class Store:
    """Records and checkpoints of one model.

    Attributes:
        folder: where they lie.
        terminal: is told of what was damaged.
    """

    folder: Path
    terminal: Terminal

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """For this process alone.

        Raises:
            CheckpointError: another one works here.
        """
        with lock_folder(self.folder):
            yield

    def path(self, kind: str, row: str, key: Key, ending: str = "") -> Path:
        """Where something of this key lies: other keys have other places."""
        return self.folder / kind / f"{file_name(row)}-{digest_of(key)}{ending}"

    def read(self, kind: str, row: str, key: Key, value: type[Value]) -> Value | None:
        """What was kept; None where nothing was, or where it cannot be trusted."""
        path = self.path(kind, row, key, ".json")
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["key"] != _plain(key):
                raise ValueError("it was written for something else")
            return value.model_validate(content["value"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.discard(path, _reason(error))
            return None

    def write(self, kind: str, row: str, key: Key, value: BaseModel) -> None:
        """Keeps `value`, in one step.

        Raises:
            CheckpointError: the disk is full.
        """
        figures = value.model_dump(mode="python", exclude_computed_fields=True)
        text = to_json({"key": _plain(key), "value": figures})
        write_in_one_step(self.path(kind, row, key, ".json"), text)

    def discard(self, path: Path, why: str) -> None:
        """Deletes what cannot be used, and says so."""
        self.terminal.warn(f"{path} cannot be used ({why}): it is made again.")
        remove(path)

    def clear(self) -> None:
        """Deletes everything that was made and measured of the model."""
        for path in self.folder.iterdir():
            if path.is_dir():
                remove(path)


def remove(path: Path) -> None:
    """Deletes a file or a folder, whether it is there or not.

    Raises:
        CheckpointError: it cannot be deleted.
    """
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be deleted ({error}): delete it.") from error


def file_name(text: str) -> str:
    """`text` as the name of a file."""
    return "".join(c if c.isalnum() or c in "-_+." else "-" for c in text)


def _plain(key: Key) -> Any:
    """As it is read back."""
    return json.loads(to_json(key))


def _reason(error: Exception) -> str:
    """In a few words."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if isinstance(error, KeyError | TypeError):
        return "it is no record of this program"
    return str(error)
