"""Hidden states between two decoder blocks, batch by batch, in memory or on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vllm_quantkit.errors import QuantkitError

Place = Literal["cpu", "disk"]
"""Where hidden states wait."""


class HiddenStates:
    """A list of float tensors, of which only the one in use need be in memory.

    Args:
        place: `cpu` keeps them in memory, `disk` in one file each.
        folder: for those files; it is made, and must hold nothing else.

    Raises:
        ValueError: `disk` without a folder.
    """

    def __init__(self, place: Place, folder: Path | None) -> None:
        if place == "disk" and folder is None:
            raise ValueError("hidden states on disk need a folder")
        self._folder = folder if place == "disk" else None
        self._kept: list[Tensor] = []
        self._stored: list[tuple[torch.Size, torch.dtype]] = []

    def __len__(self) -> int:
        return len(self._kept) + len(self._stored)

    def __iter__(self) -> Iterator[Tensor]:
        """The tensors on the CPU, in the order they came.

        Raises:
            QuantkitError: a file cannot be read.
        """
        yield from self._kept
        for index in range(len(self._stored)):
            yield self._read(index)

    def append(self, hidden: Tensor) -> None:
        """Keeps `hidden`, float of any shape.

        Raises:
            QuantkitError: the disk is full or cannot be written; says how much is needed where.
        """
        hidden = hidden.detach().cpu()
        if self._folder is None:
            self._kept.append(hidden)
            return
        path = self._path(len(self._stored))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as stream:
                stream.write(_bytes(hidden.contiguous()))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise QuantkitError(
                f"{self._folder} cannot take {hidden.nbytes:,} bytes of hidden states after "
                f"{len(self)} others ({error.strerror}): free space there, choose another folder, "
                "or keep them in memory."
            ) from error
        self._stored.append((hidden.shape, hidden.dtype))

    def discard(self) -> None:
        """Forgets all tensors and removes their files."""
        self._kept.clear()
        if self._folder is not None:
            for index in range(len(self._stored)):
                self._path(index).unlink(missing_ok=True)
            if self._folder.is_dir():
                self._folder.rmdir()
        self._stored.clear()

    def _path(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{index:06d}.raw"

    def _read(self, index: int) -> Tensor:
        shape, dtype = self._stored[index]
        hidden, path = torch.empty(shape, dtype=dtype), self._path(index)
        view = _bytes(hidden)
        try:
            with path.open("rb") as stream:
                found = stream.readinto(view)
        except OSError as error:
            raise QuantkitError(
                f"{path} cannot be read ({error.strerror}): nothing else may use that folder."
            ) from error
        if found != len(view):
            raise QuantkitError(
                f"{path} holds {found} bytes, not {len(view)}: nothing else may use that folder."
            )
        return hidden


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return tensor.view(-1).view(torch.uint8).numpy().data
