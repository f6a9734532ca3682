"""Telling how far a run is: nothing, or bars with the time that is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_quantkit.quantize.output.records import BlockRecord
from vllm_quantkit.terminal import Terminal, Tick

Phase = Callable[[str, int], AbstractContextManager[Tick]]
"""Says that a phase with so many steps begins, and when it ends."""


class Watcher(Protocol):
    """Who is told how far a run is."""

    def start(self, blocks: int, done: int) -> None:
        """So many blocks there are, and so many were finished by an earlier run."""

    def phase(self, name: str, steps: int) -> AbstractContextManager[Tick]:
        """A phase begins; see `Phase`."""

    def block_done(self, record: BlockRecord) -> None:
        """A block is finished and stored."""


class Silent:
    """Tells nobody."""

    def start(self, blocks: int, done: int) -> None:
        """Nothing."""

    @contextmanager
    def phase(self, name: str, steps: int) -> Iterator[Tick]:
        """Nothing."""
        yield _no_tick

    def block_done(self, record: BlockRecord) -> None:
        """Nothing."""


class Bars:
    """A bar for the blocks and one for the phase in work, each with the time that is left.

    Use as a context manager around the run.
    """

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._blocks = self._bars.add_task("blocks", total=None, visible=False)
        self._phase = self._bars.add_task("", total=None, visible=False)
        self._console = console

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, blocks: int, done: int) -> None:
        """Shows the bar of the blocks."""
        self._bars.update(self._blocks, total=blocks, completed=done, visible=True)

    @contextmanager
    def phase(self, name: str, steps: int) -> Iterator[Tick]:
        """Shows the bar of the phase while it lasts."""
        self._bars.reset(self._phase, total=max(steps, 1), description=f"  {name}", visible=True)
        yield lambda: self._bars.advance(self._phase)
        self._bars.update(self._phase, visible=False)

    def block_done(self, record: BlockRecord) -> None:
        """Advances the bar, and prints the block's worst layer."""
        self._bars.advance(self._blocks)
        worst = max(record.layers, key=lambda layer: layer.error, default=None)
        seconds = sum(record.seconds.values())
        if worst is not None:
            self._console.print(
                f"block {record.index}: {len(record.layers)} layers in {seconds:.1f} s, "
                f"largest error {worst.error:.2%} ({worst.name})"
            )
        for layer in record.layers:
            if layer.note:
                self._console.print(f"  {layer.name}: {layer.note}")


@contextmanager
def watching(terminal: Terminal) -> Iterator[Watcher]:
    """`Bars` beside the results, or nobody where no progress is wanted."""
    if terminal.silent:
        yield Silent()
        return
    with Bars(terminal.aside) as bars:
        yield bars


def _no_tick() -> None:
    pass
