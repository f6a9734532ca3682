"""A set of tokens on its way through the decoder blocks, a batch and a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from vllm_quantkit.quantize.calibration import TokenSet
from vllm_quantkit.quantize.model.hidden_states import HiddenStates
from vllm_quantkit.terminal import Tick

if TYPE_CHECKING:
    from vllm_quantkit.quantize.model.model_shell import BlockCall, ModelShell

Place = Literal["cpu", "disk"]
"""Where hidden states wait between two blocks."""


class Stream:
    """The hidden states of a token set between two blocks.

    Samples that were padded run one by one without their padding, so no statistic sees it.

    Args:
        shell: the model.
        tokens: the set.
        batch_size: samples that run together.
        place: where hidden states are kept.
        folder: for hidden states on disk; must not be shared with another stream.
        precision: of the products inside blocks; hidden states stay in float32.
    """

    def __init__(
        self,
        shell: ModelShell,
        tokens: TokenSet,
        batch_size: int,
        place: Place,
        folder: Path,
        *,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self._batches = list(_unpadded(tokens, batch_size))
        self._shell = shell
        self._place: Place = place
        self._folder = folder
        self._precision = precision
        self._calls: list[tuple[BlockCall, ...]] = []
        self._hidden = self._empty(0)
        self.half = 0
        """Half of the set that the batch in work belongs to."""

    @torch.no_grad()
    def enter(self, tick: Tick) -> None:
        """Runs what comes before the blocks; the model's ends must be open."""
        for ids, _ in self._batches:
            hidden, calls = self._shell.enter(ids, None)
            self._hidden.append(hidden)
            self._calls.append(calls)
            tick()

    @property
    def steps(self) -> int:
        """Batches in the set."""
        return len(self._batches)

    def run(self, index: int, block: nn.Module, tick: Tick) -> None:
        """Runs the block for what its hooks see; `tick` is called after each batch."""
        for _ in self._outputs(index, block):
            tick()

    def advance(self, index: int, block: nn.Module, tick: Tick) -> None:
        """The block's outputs become the hidden states; `tick` is called after each batch."""
        outputs = self._empty(index + 1)
        for output in self._outputs(index, block):
            outputs.append(output)
            tick()
        self._hidden.discard()
        self._hidden = outputs

    @torch.no_grad()
    def logits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids [B, T] and logits [B, T, V] of each batch; the model's ends must be open."""
        for (ids, _), hidden in zip(self._batches, self._hidden, strict=True):
            yield ids, self._shell.logits(hidden, ids, None)

    def discard(self) -> None:
        """Forgets the hidden states, on disk too."""
        self._hidden.discard()

    @torch.no_grad()
    def _outputs(self, index: int, block: nn.Module) -> Iterator[Tensor]:
        for (_, half), calls, hidden in zip(self._batches, self._calls, self._hidden, strict=True):
            self.half = half
            with self._products(block):
                output = calls[index].run(block, hidden)
            yield output.float()

    def _products(self, block: nn.Module) -> AbstractContextManager[object]:
        if self._precision is torch.float32:
            return nullcontext()
        device = next(block.parameters()).device
        return torch.autocast(device.type, dtype=self._precision)

    def _empty(self, index: int) -> HiddenStates:
        return HiddenStates(self._place, self._folder / f"{index:05d}")


def _unpadded(tokens: TokenSet, size: int) -> Iterator[tuple[Tensor, int]]:
    """Token ids [B, T] and the half each batch belongs to."""
    for ids, mask, half in tokens.batches(size):
        if mask is None:
            yield ids, half
            continue
        for row, kept in zip(ids, mask, strict=True):
            yield row[kept.bool()][None], half
