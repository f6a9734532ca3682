"""Token samples to calibrate on, and others to measure quality on.

Documents are read in order into a buffer of `DOCUMENTS` of them and leave it in a seeded order, so
a source is read no further than needed. The first to leave fill the held-out set, those that follow
the calibration set: which samples are held out depends on neither the number of calibration samples
nor on what they hold, and no document is in both sets. Of a source that is one text, windows of it
take the place of documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.quantize.calibration.options import (
    DEFAULT_SOURCE,
    ENOUGH_SAMPLES,
    LONGEST_DEFAULT,
    CalibrationOptions,
)
from vllm_quantkit.quantize.calibration.rows import RowReader
from vllm_quantkit.quantize.calibration.sources import open_source
from vllm_quantkit.quantize.calibration.stream import Special, Stream


@dataclass(frozen=True)
class TokenSet:
    """Samples of tokens; those at even places are the first half, the others the second.

    Attributes:
        input_ids: int64 [S, T].
        attention_mask: int64 [S, T], 0 where a sample is padded; None where none is.
        source: where the text came from.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    source: str

    @property
    def samples(self) -> int:
        """S."""
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """Tokens, padding aside."""
        mask = self.attention_mask
        return self.input_ids.numel() if mask is None else int(mask.sum())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape, ids and mask: the same for the same samples in the same order."""
        digest = hashlib.sha256(str(tuple(self.input_ids.shape)).encode())
        for part in (self.input_ids, self.attention_mask):
            digest.update(b"none" if part is None else part.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor | None, int]]:
        """ids [B, T], mask [B, T] or None, half: at most `size` samples, all of one half.

        The first half (0) comes first, each in the order of the set.
        """
        for half in range(2):
            for start in range(half, self.samples, 2 * size):
                rows = slice(start, start + 2 * size, 2)
                mask = self.attention_mask
                yield self.input_ids[rows], None if mask is None else mask[rows], half


class TokenSets(NamedTuple):
    """What a source gave.

    Attributes:
        calibration: to calibrate on.
        held_out: to measure quality on; of other documents.
        warnings: a sentence each.
    """

    calibration: TokenSet
    held_out: TokenSet
    warnings: tuple[str, ...]


def load_token_sets(
    options: CalibrationOptions, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> TokenSets:
    """The calibration set, the held-out set, and what the user should be warned of.

    Packed samples start with the special tokens that the tokenizer puts before a text, then hold
    documents with its end-of-text token behind each. Padded samples are a document each, with the
    special tokens around it, cut or padded on the right to a common length.

    Args:
        options: what to load.
        tokenizer: of the model that is calibrated.
        max_length: the most tokens that the model takes.

    Raises:
        QuantkitError: the source cannot be read or has too little text; says what would do.
    """
    length = _length(options, max_length)
    reader = RowReader(tokenizer, options.text_column)
    source = open_source(options.source or DEFAULT_SOURCE, reader)
    stream = Stream(source, Special.of(tokenizer), tokenizer, length)
    units = stream.shuffled(options.seed)
    cut = stream.packed if options.packing == "packed" else stream.padded
    held_out = list(islice(cut(units), options.held_out))
    calibration = list(islice(cut(units), options.samples))
    if len(held_out) < options.held_out or len(calibration) < options.samples:
        raise _too_little(options, stream, len(held_out), len(calibration))
    filler = stream.special.filler
    sets = [_token_set(rows, filler, source.description) for rows in (calibration, held_out)]
    return TokenSets(sets[0], sets[1], _warnings(options, stream))


def _length(options: CalibrationOptions, max_length: int) -> int:
    """Tokens in a sample.

    Raises:
        QuantkitError: the model does not take as many.
    """
    if options.length is not None and options.length > max_length:
        raise QuantkitError(
            f"calibration samples of {options.length} tokens do not fit this model, which takes "
            f"at most {max_length}: lower --length."
        )
    return options.length or min(LONGEST_DEFAULT, max_length)


def _token_set(rows: list[list[int]], filler: int, source: str) -> TokenSet:
    """The rows, padded to the longest, and a mask if that was needed."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [filler] * (longest - len(row)) for row in rows])
    sizes = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(longest) < sizes[:, None]).long()
    return TokenSet(ids, None if bool(mask.all()) else mask, source)


def _too_little(
    options: CalibrationOptions, stream: Stream, held_out: int, calibration: int
) -> QuantkitError:
    what = "one text" if stream.one_text and stream.documents else f"{stream.documents} documents"
    if stream.repeated:
        what += f", {stream.repeated} more that repeat others"
    return QuantkitError(
        f"{stream.source.description} ({what}) gives {held_out} of {options.held_out} held-out and "
        f"then {calibration} of {options.samples} calibration samples of {stream.length} tokens: "
        f"give more text, or lower --samples, --held-out or --length."
    )


def _warnings(options: CalibrationOptions, stream: Stream) -> tuple[str, ...]:
    said = []
    if options.samples < ENOUGH_SAMPLES:
        said.append(
            f"{options.samples} calibration samples: with fewer than {ENOUGH_SAMPLES}, scales "
            f"depend on which samples were chosen."
        )
    if stream.one_text:
        said.append(
            f"{stream.source.description} is one text, so held-out samples are other windows of "
            f"it: other text may show a greater loss."
        )
    if stream.repeated:
        said.append(
            f"{stream.repeated} documents of {stream.source.description} repeat others and were "
            f"left out."
        )
    return tuple(said)
