"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_quantkit.errors import CheckpointError


def write_in_one_step(path: Path, text: str) -> None:
    """UTF-8 in `<path>.partial`, then renamed: what was there before stays until all is written.

    Raises:
        CheckpointError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _removed(partial):
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror or error}): make room, or give a folder "
            "that can be written to."
        ) from error


@contextmanager
def _removed(path: Path) -> Iterator[None]:
    """A file that is gone afterwards, whatever happens."""
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
