"""The held-out text: what the user gives, or what the model's own report kept from calibration."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from pydantic import Field
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_quantkit.errors import ConfigError, QuantkitError
from vllm_quantkit.evaluate.origin import Origin, find_near
from vllm_quantkit.evaluate.windows import Windows
from vllm_quantkit.quantize.calibration import CalibrationOptions, TokenSet, load_token_sets
from vllm_quantkit.quantize.calibration.options import LONGEST_DEFAULT
from vllm_quantkit.quantize.calibration.rows import RowReader
from vllm_quantkit.quantize.calibration.sources import ENDINGS, open_source
from vllm_quantkit.quantize.calibration.stream import Special, Stream
from vllm_quantkit.quantize.output.report import CalibrationSummary
from vllm_quantkit.spec import Frozen

ENOUGH_WINDOWS = 32
"""Taken where the user says nothing and the text has as many."""


class TextOptions(Frozen):
    """Which text, and how much of it.

    Attributes:
        source: as `open_source` says; None is the held-out set of the model's report.
        windows: of text; None is all of the held-out set, or 32 of another text.
        length: tokens in a window; None is 2048, or what the model takes, or the held-out set's.
        seed: of the choice of documents; None is 0, or the held-out set's.
        text_column: where the text is in each row; None looks for it.
    """

    source: str | None = None
    windows: int | None = Field(default=None, ge=2)
    length: int | None = Field(default=None, ge=8)
    seed: int | None = Field(default=None, ge=0)
    text_column: str | None = None


def load_windows(folder: Path, origin: Origin, options: TextOptions) -> Windows:
    """Windows of held-out text, one token shorter than the model takes: an engine adds one.

    Args:
        folder: of the model, with its tokenizer.
        origin: what is known of how it was made.
        options: what the user wants.

    Raises:
        ConfigError: there is no text, or too little.
        QuantkitError: the source cannot be read.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known, used = origin.calibration, options.source
    if used is None and known is None:
        raise ConfigError(
            "there is no text to measure on: the model has no report of what it was calibrated on. "
            "Pass --text FILE with text that calibrated nothing."
        )
    own = known is not None and (used is None or _names(used, known))
    if known is None or not own:
        return fresh_windows(tokenizer, origin.max_length, options)
    source = used or _find_source(folder, known)
    if _wants_other(options, known):
        windows = fresh_windows(
            tokenizer, origin.max_length, options.model_copy(update={"source": source})
        )
        return Windows(windows.rows, windows.source, (*windows.warnings, _calibrated_on(known)))
    return _held_out(tokenizer, origin.max_length, source, known, options)


def fresh_windows(
    tokenizer: PreTrainedTokenizerBase, max_length: int, options: TextOptions
) -> Windows:
    """Windows of a text that no report knows.

    Raises:
        ConfigError: it has too little.
    """
    assert options.source is not None
    length = min(options.length or LONGEST_DEFAULT, max_length - 1)
    source = open_source(options.source, RowReader(tokenizer, options.text_column))
    stream = Stream(source, Special.of(tokenizer), tokenizer, length)
    wanted = options.windows or ENOUGH_WINDOWS
    rows = list(islice(stream.packed(stream.shuffled(options.seed or 0)), wanted))
    if len(rows) < (options.windows or 2):
        raise ConfigError(
            f"{source.description} gives {len(rows)} windows of {length} tokens, but "
            f"{options.windows or 2} are needed: give more text, or lower --windows or --length."
        )
    return Windows(tuple(map(tuple, rows)), source.description, _cut(options.length, max_length))


def _held_out(
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    source: str,
    known: CalibrationSummary,
    options: TextOptions,
) -> Windows:
    """The held-out set of the report, made anew and compared with what it was."""
    given = CalibrationOptions(
        source=source,
        samples=known.samples,
        length=known.length,
        packing="padded" if known.packing == "padded" else "packed",
        held_out=known.held_out_samples,
        seed=known.seed,
        allow_few_samples=True,
        text_column=options.text_column,
    )
    try:
        found = load_token_sets(given, tokenizer, max_length).held_out
    except ConfigError:
        raise
    except QuantkitError as error:
        raise ConfigError(
            f"the text that the model was calibrated on cannot be read again ({error}) Pass --text "
            "FILE with text that calibrated nothing."
        ) from error
    if found.fingerprint != known.held_out_fingerprint:
        raise ConfigError(
            f"{source} is not the text that the model was calibrated on any more, or its tokenizer "
            "changed: the held-out windows are other ones. Pass --text FILE with text that "
            "calibrated nothing."
        )
    rows = tuple(row[: max_length - 1] for row in _rows(found))[: options.windows]
    return Windows(rows, f"{found.source}, held out from calibration")


def _rows(found: TokenSet) -> list[tuple[int, ...]]:
    """Samples without their padding; one token alone predicts nothing and is left out."""
    mask = found.attention_mask
    sizes = [found.input_ids.shape[1]] * found.samples if mask is None else mask.sum(1).tolist()
    rows = zip(found.input_ids.tolist(), sizes, strict=True)
    return [tuple(row[:size]) for row, size in rows if size > 1]


def _names(given: str, known: CalibrationSummary) -> bool:
    """True where the user names the source that calibrated the model."""
    path = Path(given).expanduser()
    name = f"{path.resolve().name}/" if path.is_dir() else path.name if path.is_file() else given
    return name == known.source


def _find_source(folder: Path, known: CalibrationSummary) -> str:
    """Where the calibration text is now: a report keeps a file's name, not its folder.

    Raises:
        ConfigError: it was a file, which is not near the model.
    """
    is_file = known.source.endswith(("/", *ENDINGS))
    found = find_near(folder, known.source) if is_file else None
    if is_file and found is None:
        raise ConfigError(
            f"the model was calibrated on {known.source}, which is neither here nor near the "
            "model: pass it with --text to measure on its held-out windows, or any other text."
        )
    return known.source if found is None else str(found)


def _wants_other(options: TextOptions, known: CalibrationSummary) -> bool:
    """True where the held-out set does not have what the user asks for."""
    return (
        (options.windows or 0) > known.held_out_samples
        or options.length not in (None, known.length)
        or options.seed not in (None, known.seed)
    )


def _calibrated_on(known: CalibrationSummary) -> str:
    return (
        f"{known.source} calibrated this model, and these windows are not the ones held out from "
        "that: the figures are better than on other text. Leave out --windows, --length and "
        "--seed, or pass another text."
    )


def _cut(length: int | None, max_length: int) -> tuple[str, ...]:
    if length is None or length < max_length:
        return ()
    return (f"windows have {max_length - 1} tokens, not {length}: the model takes {max_length}.",)
