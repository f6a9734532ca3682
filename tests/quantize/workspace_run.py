"""A run of two blocks, and a way to let its process kill itself at any file operation."""

from __future__ import annotations

import builtins
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_quantkit.quantize.output.records import BlockRecord
from vllm_quantkit.quantize.output.workspace import Workspace

BLOCKS = 2
PLAN = {"recipe": {"bits": 4}, "blocks": BLOCKS}
COUNTED = ("rename", "replace", "unlink", "fsync", "mkdir", "rmdir")


def block(index: int) -> dict[str, Tensor]:
    """What a block becomes: a function of its number, as in a run that can be repeated."""
    generator = torch.Generator().manual_seed(index)
    return {
        f"layers.{index}.w.codes": torch.randint(256, (300, 7), generator=generator).int(),
        f"layers.{index}.w.scales": torch.rand(300, 1, generator=generator).half(),
    }


def run(source: Path, out: Path) -> None:
    """Begins, or goes on with what is there, and comes to the end."""
    with Workspace.create(out, PLAN, resume=True) as workspace:
        for index in range(BLOCKS):
            if not workspace.block_done(index):
                workspace.write_block(index, block(index), BlockRecord(index=index, layers=()))
                workspace.note("progress", index)
        replaced = [f"layers.{index}.w.weight" for index in range(BLOCKS)]
        workspace.finish(source, replaced, {"quantized": True}, {"README.md": "card\n"})


def killed(source: Path, out: Path, deadly: int) -> bool:
    """`run` in a fork that kills itself before file operation number `deadly`.

    Operations are renames, deletions, flushes to the disk, new folders, and files opened for
    writing. Returns False where the run came to its end before.
    """
    pid = os.fork()
    if pid == 0:
        try:
            _die_before(deadly)
            run(source, out)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _die_before(deadly: int) -> None:
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in COUNTED:
        setattr(os, name, _counted(getattr(os, name), count))
    original = io.open

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "w" in mode:
            count()
        return original(file, mode, *args, **options)

    io.open = builtins.open = opened


def _counted(function: Callable[..., Any], count: Callable[[], None]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        count()
        return function(*args, **options)

    return call
