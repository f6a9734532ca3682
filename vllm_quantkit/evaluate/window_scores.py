"""One window's tokens: how likely a model finds them, and how far it is from another model.

Log-probabilities come a few positions at a time and are not kept: those of 2,048 positions and a
vocabulary of 128,000 entries are a gigabyte. Those of the model that others are compared with go to
a file, float32 [T - 1, V], which is read in the same order.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_quantkit.errors import CheckpointError

STORED = np.dtype("<f4")
"""How log-probabilities lie in a file."""

ROWS = 128
"""Positions that are compared at a time: in float64, their distributions take a tenth of a gigabyte
for each 100,000 entries of a vocabulary."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WindowScores:
    """Figures for each predicted token of a window, float64 [T - 1].

    Attributes:
        losses: -ln q of the token that follows.
        base_losses: -ln p of it, p the model compared with; None where there is none.
        divergences: KL(p || q) in nats.
        agreements: 1 where p and q have the same most likely token, else 0.
    """

    losses: Floats
    base_losses: Floats | None = None
    divergences: Floats | None = None
    agreements: Floats | None = None

    def to_json(self) -> dict[str, Any]:
        """Lists of numbers."""
        parts = vars(self).items()
        return {name: None if part is None else part.tolist() for name, part in parts}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> WindowScores:
        """What `to_json` wrote."""
        arrays: dict[str, Any] = {
            name: None if part is None else np.asarray(part, dtype=np.float64)
            for name, part in content.items()
        }
        return cls(**arrays)


class WindowStream:
    """Takes ln q of a window's positions in order, and forgets them at once.

    Args:
        tokens: of the window.
        base: file of ln p to compare with.
    """

    def __init__(
        self, tokens: Sequence[int], base: BinaryIO | None = None, keep: BinaryIO | None = None
    ) -> None:
        """`keep` is the file that takes ln q; see `open_stream`."""
        self._targets = torch.tensor(tokens[1:])
        self._base, self._keep = base, keep
        self._done = 0
        self._losses: list[Tensor] = []
        self._compared: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, log_probs: Tensor) -> None:
        """ln q, float32 [R, V], of the next R positions; those past the last token are left out.

        Raises:
            CheckpointError: a value is not a number, or the base has another vocabulary.
            OSError: a file cannot be read or written.
        """
        if self._base is not None and not self._done:
            _check_size(self._base, len(self._targets), log_probs.shape[1])
        left = len(self._targets) - self._done
        for rows in log_probs[:left].split(ROWS):
            self._add(rows)

    def finish(self) -> WindowScores:
        """The window's figures.

        Raises:
            CheckpointError: positions are missing.
        """
        if self._done != len(self._targets):
            raise CheckpointError(
                f"the model gave {self._done} of {len(self._targets)} distributions of a window; "
                "this vLLM cannot be measured, use --backend hf."
            )
        losses = _joined(self._losses)
        if self._base is None:
            return WindowScores(losses)
        return WindowScores(losses, *map(_joined, zip(*self._compared, strict=True)))

    def _add(self, rows: Tensor) -> None:
        targets = self._targets[self._done : self._done + len(rows), None].to(rows.device)
        if bool(rows.isnan().any()):
            raise CheckpointError(
                f"the model's logits at position {self._done} of a window are not numbers: its "
                "weights or its activations overflow; run `quantkit check` on it."
            )
        self._losses.append(-rows.gather(1, targets)[:, 0].double())
        if self._base is not None:
            p = _read_rows(self._base, rows)
            self._compared.append((-p.gather(1, targets)[:, 0], *compare(p, rows.double())))
        if self._keep is not None:
            self._keep.write(rows.float().cpu().numpy().astype(STORED, copy=False).tobytes())
        self._done += len(rows)


@contextmanager
def open_stream(
    tokens: Sequence[int], *, base: Path | None = None, keep: Path | None = None
) -> Iterator[WindowStream]:
    """A window's stream; `keep` appears in one step, once everything is in it.

    Args:
        tokens: of the window.
        base: file of ln p, [T - 1, V], to compare with.
        keep: file that takes ln q, [T - 1, V].

    Raises:
        CheckpointError: the disk is full.
    """
    partial = None if keep is None else keep.with_name(keep.name + ".partial")
    try:
        with _opened(base, "rb") as reading, _opened(partial, "wb") as writing:
            yield WindowStream(tokens, reading, writing)
        if keep is not None and partial is not None:
            partial.replace(keep)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(
            f"the disk of {keep} is full: make room and run the same command again, which keeps "
            "the windows that are done."
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def compare(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL = sum p (ln p - ln q), and 1 where the largest are at the same place, of logs [R, V]."""
    weights = p.exp()
    # Entries that a model masks have ln p = -inf, and add nothing.
    terms = torch.where(weights > 0, weights * (p - q), 0.0)
    return terms.sum(-1).clamp_min(0), (p.argmax(-1) == q.argmax(-1)).double()


@contextmanager
def _opened(path: Path | None, mode: str) -> Iterator[BinaryIO | None]:
    if path is None:
        yield None
        return
    with path.open(mode) as file:
        yield file  # type: ignore[misc]  # the mode is one of bytes


def _check_size(file: BinaryIO, positions: int, vocabulary: int) -> None:
    """Refuses a file that is not float32 [positions, vocabulary]."""
    size, wanted = os.fstat(file.fileno()).st_size, positions * vocabulary * STORED.itemsize
    if size != wanted:
        raise CheckpointError(
            f"{file.name} has {size:,} bytes, but {vocabulary:,} log-probabilities for each of "
            f"{positions} tokens are {wanted:,}: it is damaged, or of a model with another "
            "vocabulary. Compare models that share a tokenizer, or delete the file to measure it "
            "again."
        )


def _read_rows(file: BinaryIO, like: Tensor) -> Tensor:
    """The next rows of ln p, float64, as many and as long as `like`."""
    data = np.fromfile(file, STORED, like.numel())
    return torch.from_numpy(data).view(like.shape).to(like.device).double()


def _joined(parts: Sequence[Tensor]) -> Floats:
    return np.asarray(torch.cat(list(parts)).double().cpu().numpy())
