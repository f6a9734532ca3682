"""How a command ends: errors as one sentence, Ctrl-C with what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.terminal import Terminal

FAILED = 1
"""Exit status of a command that an error ended, or whose gate failed."""

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended, as shells have it."""

BEGINS_ANEW = "the same command begins anew."
RESUMES = "the same command with --resume goes on where this one stopped."
GOES_ON = "the same command goes on where this one stopped."


@contextmanager
def told(terminal: Terminal, interrupted: str = BEGINS_ANEW) -> Iterator[None]:
    """An error becomes one sentence and exit status 1; Ctrl-C says how to go on.

    Args:
        terminal: where it is said.
        interrupted: what to do after Ctrl-C.
    """
    try:
        yield
    except QuantkitError as error:
        terminal.error(str(error))
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt:
        terminal.note(f"interrupted: {interrupted}")
        raise typer.Exit(INTERRUPTED) from None
