"""What a model's own forward gives its decoder blocks, found by running it with the blocks out.

Embeddings, masks, positions, the final norm, the head and soft caps are thus always the model's own
code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from vllm_quantkit.errors import UnsupportedScheme

Result = TypeVar("Result")


@dataclass
class BlockCall:
    """How a model calls a decoder block.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: named arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What the block makes of `hidden`, float [B, T, H] on any device."""
        device = next(block.parameters()).device
        output = block(hidden.to(device), *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


class TensorPool:
    """Stores equal tensors once: masks and rotations of equally long batches are equal."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()

    def shared(self, value: Any) -> Any:
        """`value` with every tensor in it, also inside tuples, replaced by one that is equal."""
        if isinstance(value, tuple):
            return tuple(self.shared(item) for item in value)
        if not isinstance(value, Tensor):
            return value
        data = value.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data
        digest = hashlib.blake2b(data, digest_size=16).digest()
        return self._known.setdefault((value.dtype, value.shape, value.device, digest), value)


class BlockCaller:
    """Runs a causal language model with its decoder blocks taken out.

    Args:
        model: in evaluation mode; its blocks need no weights.
        blocks: all its decoder blocks, in order.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._model = model
        self._blocks = blocks
        self._pool = TensorPool()
        self._tuples: bool | None = None  # whether blocks return tuples; None: not known yet

    def enter(self, inputs: dict[str, Any]) -> tuple[Tensor, tuple[BlockCall, ...]]:
        """What the first block reads, float [B, T, H], and how each block is called.

        Raises:
            UnsupportedScheme: more than hidden states goes from block to block.
        """

        def run(returns_tuples: bool) -> _Passage:
            passage = _Passage(len(self._blocks), None, returns_tuples)
            with _replaced(self._blocks, passage.pass_on):
                try:
                    self._model(**inputs)
                except _LastBlockReached:
                    return passage
            raise _NotPassedOn(f"it ran {len(passage.calls)} of {len(self._blocks)} blocks")

        passage = self._in_either_form(run, decides=len(self._blocks) > 1)
        seen: dict[int, Any] = {}
        calls = tuple(self._shared(call, seen) for call in passage.calls)
        return passage.entered, calls

    def logits(self, hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
        """float [B, T, V]: what the model makes of the last block's output `hidden`, [B, T, H].

        Raises:
            UnsupportedScheme: the model does not run with its blocks taken out.
        """

        def run(returns_tuples: bool) -> Tensor:
            passage = _Passage(len(self._blocks), hidden, returns_tuples)
            with _replaced(self._blocks, passage.pass_on):
                logits: Tensor = self._model(**inputs).logits
            if logits.shape[:-1] != hidden.shape[:-1]:
                raise _NotPassedOn(f"its logits have shape {list(logits.shape)}")
            return logits

        return self._in_either_form(run, decides=True)

    def _in_either_form(self, run: Callable[[bool], Result], *, decides: bool) -> Result:
        """The result with blocks that return tensors, or tuples, whichever the model accepts."""
        if self._tuples is not None:
            return run(self._tuples)
        problems: list[Exception] = []
        for form in (False, True):
            try:
                result = run(form)
            except UnsupportedScheme:
                raise
            except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
                problems.append(error)
                continue
            if decides:
                self._tuples = form
            return result
        if repr(problems[0]) == repr(problems[1]) and not isinstance(problems[0], _NotPassedOn):
            raise problems[0]  # the inputs are to blame, not what the blocks return
        raise UnsupportedScheme(
            f"{type(self._model).__name__} does not run with its decoder blocks taken out "
            f"({problems[0]}), so it cannot be quantised block by block."
        ) from problems[0]

    def _shared(self, call: BlockCall, seen: dict[int, Any]) -> BlockCall:
        """Most arguments are the same objects for all blocks; each is looked up once."""

        def once(value: Any) -> Any:
            if id(value) not in seen:
                seen[id(value)] = (value, self._pool.shared(value))
            return seen[id(value)][1]

        args = tuple(once(value) for value in call.args)
        return BlockCall(args, {name: once(value) for name, value in call.kwargs.items()})


class _LastBlockReached(Exception):  # noqa: N818 - not an error
    """Ends a forward of which the rest is not needed."""


class _NotPassedOn(ValueError):  # noqa: N818
    """The model did not hand a block what the block before it returned."""


class _Passage:
    """Stands for all blocks in one forward: notes their calls and passes on hidden states.

    Args:
        count: blocks.
        replacement: what the blocks return; None for what the first reads, and then the forward
            ends with the last block.
        returns_tuples: whether the blocks return a tuple or a tensor.
    """

    def __init__(self, count: int, replacement: Tensor | None, returns_tuples: bool) -> None:
        self.calls: list[BlockCall] = []
        self._count = count
        self._replacement = replacement
        self._tuples = returns_tuples
        self._returned: list[Tensor] = []

    @property
    def entered(self) -> Tensor:
        """What the first block read."""
        return self._returned[0].detach()

    def pass_on(self, index: int, /, *args: Any, **kwargs: Any) -> Any:
        """Takes the place of the forward of block `index`."""
        if index != len(self.calls):
            raise _NotPassedOn(f"block {index} runs after {len(self.calls)} blocks")
        if args:
            hidden, *others = args
        else:
            hidden, others = kwargs.pop("hidden_states"), []
        if self._returned and hidden is not self._returned[-1]:
            raise _NotPassedOn(f"block {index} does not read what the one before it returns")
        for name, value in (*enumerate(others), *kwargs.items()):
            self._refuse_crossing(index, name, value)
        self.calls.append(BlockCall(tuple(others), kwargs))
        # A view of its own for each block: where it turns up tells which block made it.
        source = self._replacement if self._replacement is not None else hidden
        self._returned.append(source.view_as(source))
        if self._replacement is None and len(self.calls) == self._count:
            raise _LastBlockReached
        return (self._returned[-1],) if self._tuples else self._returned[-1]

    def _refuse_crossing(self, index: int, name: object, value: Any) -> None:
        """Refuses an argument through which blocks could hand on more than hidden states."""
        items = value if isinstance(value, tuple) else (value,)
        for item in items:
            made = any(item is output for output in self._returned)
            shared = isinstance(item, MutableMapping | MutableSequence) or hasattr(item, "update")
            if made or shared:
                raise UnsupportedScheme(
                    f"block {index} is given {name!r} ({type(item).__name__}), through "
                    "which it reads more of other blocks than the last one's hidden states: such "
                    "a model cannot be quantised block by block."
                )


@contextmanager
def _replaced(blocks: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """`forward`, called with the block's index first, in place of each block's own."""
    own = [vars(block).get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = partial(forward, index)
    try:
        yield
    finally:
        for block, former in zip(blocks, own, strict=True):
            del block.forward
            if former is not None:
                block.forward = former
