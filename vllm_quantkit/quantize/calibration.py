"""Calibration: token windows, and what the layers of a block see of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from vllm_quantkit.errors import QuantkitError


@dataclass(frozen=True)
class InputStats:
    """Second and first moments of a layer's inputs x over all calibration tokens.

    Attributes:
        hessian: float32 [K, K], mean of x x^T.
        mean_abs: float32 [K], mean of |x|.
    """

    hessian: Tensor
    mean_abs: Tensor


def token_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, *, count: int, length: int, seed: int = 0
) -> Tensor:
    """int64 [count, length]: windows of `text` at seeded random places, in random order.

    Each starts with the special tokens that the tokenizer puts before a prompt.

    Args:
        text: calibration text.
        tokenizer: of the model that is calibrated.
        count: windows; no two overlap.
        length: tokens in each, the special ones included.
        seed: of the choice.

    Raises:
        QuantkitError: the text is too short.
    """
    prefix = torch.tensor(tokenizer("").input_ids, dtype=torch.int64)
    encoded = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    tokens = torch.tensor(encoded, dtype=torch.int64)
    body = length - len(prefix)
    available = len(tokens) // body
    if available < count:
        raise QuantkitError(
            f"{count} calibration windows of {length} tokens need {count * body} tokens, but the "
            f"text has {len(tokens)}: give more text, or ask for fewer or shorter windows."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:count]
    windows = tokens[: available * body].view(available, body)[chosen]
    return torch.cat([prefix.expand(count, -1), windows], dim=1)


class BlockInputs:
    """The decoder blocks' calibration inputs: hidden states of one block, arguments of all.

    Attributes:
        hidden: per batch, float [B, T, H]: what the block in turn reads. Set it to that block's
            outputs to go on to the next.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Tensor]
    ) -> None:
        """Runs the model over `batches` (int64 [B, T]) once and keeps what its blocks are given."""
        self.hidden: list[Tensor] = []
        self._arguments: list[list[tuple[Any, dict[str, Any]]]] = [[] for _ in blocks]
        with ExitStack() as hooks, torch.no_grad():
            for index, block in enumerate(blocks):
                hook = partial(self._record, index)
                handle = block.register_forward_pre_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            for batch in batches:
                model(input_ids=batch, use_cache=False)

    def _record(
        self, index: int, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        if index == 0:
            self.hidden.append(args[0])
        self._arguments[index].append((args[1:], named))

    @torch.no_grad()
    def run(self, index: int, block: nn.Module) -> list[Tensor]:
        """The outputs of block `index` on `hidden`, batch by batch."""
        outputs = []
        for hidden, (args, named) in zip(self.hidden, self._arguments[index], strict=True):
            output = block(hidden, *args, **named)
            outputs.append(output[0] if isinstance(output, tuple) else output)
        return outputs


def input_stats(run: Callable[[], object], layers: dict[str, nn.Module]) -> dict[str, InputStats]:
    """The moments of each layer's inputs while `run` runs."""
    sums = {name: _Moments() for name in layers}
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(_watched(layer, sums[name].add))
        run()
    return {name: moments.mean() for name, moments in sums.items()}


class _Moments:
    """Running sums of x x^T and |x| over tokens."""

    def __init__(self) -> None:
        self.outer: Tensor | float = 0.0
        self.absolute: Tensor | float = 0.0
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        self.outer = self.outer + rows.T @ rows
        self.absolute = self.absolute + rows.abs().sum(0)
        self.tokens += len(rows)

    def mean(self) -> InputStats:
        if isinstance(self.outer, float) or isinstance(self.absolute, float):
            raise QuantkitError(
                "a layer saw no calibration tokens, so nothing says how to round it."
            )
        return InputStats(self.outer / self.tokens, self.absolute / self.tokens)


@contextmanager
def _watched(layer: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Gives `see` every input of `layer` inside the block."""
    handle = layer.register_forward_pre_hook(lambda _, args: see(args[0]))
    try:
        yield
    finally:
        handle.remove()
