"""What a folder holds, by content: a file that was touched or copied is still the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.one_step import write_in_one_step

DECIDES = frozenset({".json", ".safetensors", ".jinja", ".model", ".txt", ".py", ".yaml"})
"""Endings of the files that a model's figures depend on; reports and cards are not among them."""

REPORTS = frozenset({"quantkit_report.json"})


def digest_of(content: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that differ wherever the JSON does."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Digests:
    """SHA-256 of folders, remembered by the files' sizes and times, so that each is read once.

    Args:
        file: where they are remembered; one that cannot be read is made anew.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known = _read(file)

    def folder(self, folder: Path) -> str:
        """Of every file in it that decides what the model computes, by name and content.

        Raises:
            CheckpointError: there is no such folder, or a file cannot be read.
        """
        try:
            paths = [path for path in sorted(folder.rglob("*")) if _decides(path)]
            parts = {str(path.relative_to(folder)): self._of(path) for path in paths}
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read ({error}).") from error
        if not parts:
            raise CheckpointError(f"{folder} holds no model: give a transformers model folder.")
        self._remember()
        return digest_of(parts)

    def _of(self, path: Path) -> str:
        facts = path.stat()
        name, state = str(path.resolve()), f"{facts.st_size} {facts.st_mtime_ns}"
        known = self._known.get(name)
        if known is None or known[0] != state:
            with path.open("rb") as file:
                known = (state, hashlib.file_digest(file, "sha256").hexdigest())
            self._known[name] = known
        return known[1]

    def _remember(self) -> None:
        write_in_one_step(self._file, json.dumps(self._known))


def _decides(path: Path) -> bool:
    return path.suffix in DECIDES and path.name not in REPORTS and path.is_file()


def _read(file: Path) -> dict[str, tuple[str, str]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): (str(state), str(digest)) for name, (state, digest) in content.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
