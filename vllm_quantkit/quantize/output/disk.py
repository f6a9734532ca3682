"""Full disks and locked folders, said in a sentence."""

from __future__ import annotations

import errno
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vllm_quantkit.errors import CheckpointError

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def disk_full(folder: Path, free: int, needed: int) -> CheckpointError:
    """The error of a disk that has no room for what comes next."""
    more = f", and {needed:,} bytes are needed" if needed else ""
    return CheckpointError(
        f"The disk of {folder} is full: {free:,} bytes are free{more}. Make room and use --resume: "
        "what is done so far is kept."
    )


@contextmanager
def translate_disk_full(
    folder: Path, needed: int, half_written: Path | None = None
) -> Iterator[None]:
    """A full disk becomes a `CheckpointError`; `half_written` is deleted.

    Raises:
        CheckpointError: the disk, or the user's share of it, is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        if half_written is not None:
            shutil.rmtree(half_written, ignore_errors=True)
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        raise disk_full(folder, shutil.disk_usage(existing).free, needed) from error


def lock_folder(folder: Path) -> BinaryIO:
    """The folder's lock, held until the file is closed or the process ends."""
    file = (folder / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise CheckpointError(
            f"Another process works in {folder}. Wait for it, or write to another folder."
        ) from None
    except OSError as error:
        file.close()
        raise CheckpointError(
            f"{folder} cannot be locked against other processes ({error}). Write to a file system "
            "with locks."
        ) from None
    return file
