"""A source's documents as token ids, in a seeded order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from random import Random
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from vllm_quantkit.quantize.calibration.rows import Document
from vllm_quantkit.quantize.calibration.sources import Source

DOCUMENTS = 1000
"""Documents, or windows of one text, among which the seed chooses."""

CHARACTERS = 64 << 20
"""Of buffered documents: long ones are chosen among fewer."""

SHORTEST = 2
"""Tokens of a document, special ones aside: one token predicts nothing."""

T = TypeVar("T")


@dataclass(frozen=True)
class Special:
    """A tokenizer's special tokens.

    Attributes:
        before: what it puts before a text.
        after: what it puts behind one.
        end: ends a document; empty where the tokenizer has no such token.
        filler: pads; masked, so any token does.
    """

    before: list[int]
    after: list[int]
    end: list[int]
    filler: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Special:
        """What the tokenizer puts around a text."""
        around = tokenizer("a", return_special_tokens_mask=True)
        ids, is_special = around["input_ids"], around["special_tokens_mask"]
        first = is_special.index(0)
        last = len(ids) - is_special[::-1].index(0)
        end, filler = tokenizer.eos_token_id, tokenizer.pad_token_id
        return cls(
            before=ids[:first],
            after=ids[last:],
            end=[] if end is None else [end],
            filler=next(token for token in (filler, end, 0) if token is not None),
        )


@dataclass
class Stream:
    """Token ids of a source's documents, without the tokens before and after them.

    Attributes:
        source: of the documents.
        special: tokens of the tokenizer.
        tokenizer: of the model that is calibrated.
        length: tokens in a sample.
        one_text: True where windows of a single text take the place of documents.
        documents: read so far, each once.
        repeated: documents read so far that repeat others.
    """

    source: Source
    special: Special
    tokenizer: PreTrainedTokenizerBase
    length: int
    one_text: bool = False
    documents: int = 0
    repeated: int = 0
    _seen: set[bytes] = field(default_factory=set)

    def shuffled(self, seed: int) -> Iterator[list[int]]:
        """Documents, or windows of the one text, each once."""
        documents = self._counted(self.source.documents())
        first = list(islice(documents, 2))
        documents = chain(first, documents)
        self.one_text = self.source.one_text or len(first) < 2
        if self.one_text:
            return shuffled(self._windows(documents), seed, DOCUMENTS)
        chosen = shuffled(documents, seed, DOCUMENTS, lambda document: len(document.text))
        units = map(self._tokens, chosen)
        return (unit for unit in units if len(unit) >= SHORTEST)

    def packed(self, units: Iterator[list[int]]) -> Iterator[list[int]]:
        """Windows of the units' tokens in a row; what is left at the end is lost."""
        before, end = self.special.before, [] if self.one_text else self.special.end
        rest, size = list[int](), self.length - len(before)
        for unit in units:
            rest += unit if unit[-1:] == end else unit + end
            whole = len(rest) // size * size
            yield from (before + rest[start : start + size] for start in range(0, whole, size))
            rest = rest[whole:]

    def padded(self, units: Iterator[list[int]]) -> Iterator[list[int]]:
        """A unit each, cut to the length."""
        for unit in units:
            yield (self.special.before + unit + self.special.after)[: self.length]

    def _tokens(self, document: Document) -> list[int]:
        """A document's ids; what a chat template put before it is taken off."""
        # JSON may hold halves of surrogate pairs, which no tokenizer takes.
        text = document.text.encode(errors="replace").decode()
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        before = self.special.before
        prefixed = document.rendered and before and ids[: len(before)] == before
        return ids[len(before) :] if prefixed else ids

    def _counted(self, documents: Iterator[Document]) -> Iterator[Document]:
        """Leaves out documents that came before: they could be in both sets."""
        for document in documents:
            digest = hashlib.blake2b(document.text.encode(errors="replace"), digest_size=16)
            if digest.digest() in self._seen:
                self.repeated += 1
                continue
            self._seen.add(digest.digest())
            self.documents += 1
            yield document

    def _windows(self, parts: Iterator[Document]) -> Iterator[list[int]]:
        """Windows of one text, such that each fills a sample; what is left at the end is lost."""
        size, rest = self.length - len(self.special.before), list[int]()
        for part in parts:
            rest += self._tokens(part)
            whole = len(rest) // size * size
            yield from (rest[start : start + size] for start in range(0, whole, size))
            rest = rest[whole:]


def shuffled(
    items: Iterator[T], seed: int, room: int, size: Callable[[T], int] = lambda _: 0
) -> Iterator[T]:
    """The items in a seeded order, read no more than `room` ahead.

    Args:
        items: read as they are asked for.
        seed: of the order.
        room: items to choose among.
        size: characters of an item; fewer items are held where these exceed `CHARACTERS`.
    """
    random, held, total = Random(seed), list[T](), 0
    for item in items:
        held.append(item)
        total += size(item)
        while len(held) > room or (total > CHARACTERS and len(held) > 1):
            index = random.randrange(len(held))
            held[index], held[-1] = held[-1], held[index]
            chosen = held.pop()
            total -= size(chosen)
            yield chosen
    random.shuffle(held)
    yield from held
