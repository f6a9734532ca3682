"""Where calibration text comes from: files, folders and data sets, read as a stream."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from types import ModuleType

from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.quantize.calibration.rows import Document, Row, RowReader

TEXT_ENDINGS = (".txt", ".md")
ROW_ENDINGS = (".jsonl", ".parquet")
ENDINGS = TEXT_ENDINGS + ROW_ENDINGS

PART = 1 << 20
"""Characters of a text file that are held at once."""

HUB_NAME = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^:@/]+))?(@(?P<split>[^:@/]+))?", re.ASCII
)
"""A data set's name, as in `name`, `name:config`, `name@split` or `name:config@split`."""


@dataclass(frozen=True)
class Source:
    """A stream of documents.

    Attributes:
        description: the file's name, or the data set's with its config and split.
        documents: starts the stream anew.
        one_text: True where the documents are parts of a single text, in its order.
    """

    description: str
    documents: Callable[[], Iterator[Document]]
    one_text: bool = False


def open_source(given: str, reader: RowReader) -> Source:
    """The documents of a file, of a folder's files, or of a data set.

        notes.txt, notes.md      one text in UTF-8
        chats.jsonl              a JSON object on each line: `text`; `messages` or `conversations`,
                                 rendered by the chat template; or `prompt` and `completion`
        chats.parquet            the same in columns
        folder/                  every such file in it, at any depth, ordered by path
        name, name:config, name@split, name:config@split
                                 a data set of the hub; the split is `train` where none is given

    What exists on disk is never looked for on the hub.

    Args:
        given: one of those.
        reader: makes documents of rows.

    Raises:
        QuantkitError: there is no such source, or what reads it is not installed.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        return _folder(path, reader)
    if path.is_file():
        if path.suffix.lower() not in ENDINGS:
            raise QuantkitError(
                f"{path} cannot be calibrated on: a file must end in {', '.join(ENDINGS)}."
            )
        return _files([path], path.name, reader)
    found = HUB_NAME.fullmatch(given)
    if found is None or path.suffix.lower() in ENDINGS:
        raise QuantkitError(
            f"there is no file or folder {path}; give --calibration FILE ({', '.join(ENDINGS)}), "
            f"a folder of such files, or a data set such as name:config@split."
        )
    return _hub(found["name"], found["config"], found["split"] or "train", reader)


def _folder(folder: Path, reader: RowReader) -> Source:
    hidden = [path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS]
    files = [path for path in hidden if path.is_file() and not _is_hidden(path, folder)]
    if not files:
        raise QuantkitError(
            f"{folder} holds nothing to calibrate on: no file in it ends in {', '.join(ENDINGS)}."
        )
    return _files(sorted(files), f"{folder.resolve().name}/", reader)


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _files(files: list[Path], description: str, reader: RowReader) -> Source:
    if any(path.suffix.lower() == ".parquet" for path in files):
        _optional("pyarrow", "parquet files")

    def documents() -> Iterator[Document]:
        for path in files:
            yield from _documents(path, reader)

    one_text = len(files) == 1 and files[0].suffix.lower() in TEXT_ENDINGS
    return Source(description, documents, one_text)


def _documents(path: Path, reader: RowReader) -> Iterator[Document]:
    if path.suffix.lower() in TEXT_ENDINGS:
        yield from map(Document, text_parts(path))
        return
    rows = _json_rows(path) if path.suffix.lower() == ".jsonl" else _parquet_rows(path, reader)
    for place, row in rows:
        yield reader.read(row, place)


def text_parts(path: Path, size: int = PART) -> Iterator[str]:
    """The text in parts of about `size` characters, cut before a paragraph, line or word.

    Raises:
        QuantkitError: the file is not UTF-8.
    """
    rest = ""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while read := file.read(size):
                rest += read
                if len(rest) > size:
                    cut = max(rest.rfind("\n\n"), 0) or max(rest.rfind("\n"), 0) or rest.rfind(" ")
                    cut = cut if cut > 0 else len(rest)
                    yield rest[:cut]
                    rest = rest[cut:]
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), error) from error
    if rest:
        yield rest


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Each line's object, with its place; empty lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            if line.strip():
                yield place, _json_row(line, place)


def _json_row(line: bytes, place: str) -> Row:
    try:
        text = line.decode("utf-8-sig").strip()
        row = json.loads(text)
    except UnicodeDecodeError as error:
        raise _not_utf8(place, error) from error
    except json.JSONDecodeError as error:
        raise QuantkitError(
            f"{place} is not JSON ({error.msg} at column {error.colno}): each line must be an "
            f'object such as {{"text": "..."}}.'
        ) from error
    if not isinstance(row, dict):
        raise QuantkitError(
            f'{place} holds {text[:40]!r}: each line must be an object such as {{"text": "..."}}.'
        )
    return row


def _parquet_rows(path: Path, reader: RowReader) -> Iterator[tuple[str, Row]]:
    """Each row with its place, a few at a time."""
    arrow, parquet = _optional("pyarrow", "parquet files"), import_module("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in reader.columns] or names
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (arrow.ArrowException, OSError) as error:
        raise QuantkitError(f"{path} cannot be read as parquet: {error}.") from error


def _hub(name: str, config: str | None, split: str, reader: RowReader) -> Source:
    datasets = _optional("datasets", f"the data set {name}")
    described = f"{name}{f':{config}' if config else ''}@{split}"

    def documents() -> Iterator[Document]:
        rows = _hub_rows(datasets, name, config, split)
        for number, row in enumerate(rows, start=1):
            yield reader.read(row, f"{described}, row {number}")

    return Source(described, documents)


def _hub_rows(datasets: ModuleType, name: str, config: str | None, split: str) -> Iterator[Row]:
    """The rows of a data set of the hub, as they arrive.

    Its client lets errors of several HTTP libraries through, which share no class.
    """
    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:
        raise QuantkitError(
            f"the data set {name} ({f'config {config}, ' if config else ''}split {split}) cannot "
            f"be read from the hub ({type(error).__name__}: {str(error).strip().rstrip('.')}); "
            f"give your own text with --calibration FILE."
        ) from error


def _optional(module: str, what: str) -> ModuleType:
    """A module of the extra `data`.

    Raises:
        QuantkitError: it is not installed.
    """
    if util.find_spec(module) is None:
        raise QuantkitError(
            f"{what} cannot be read without {module}: run pip install 'vllm-quantkit[data]'."
        )
    return import_module(module)


def _not_utf8(place: str, error: UnicodeDecodeError) -> QuantkitError:
    byte = error.object[error.start]
    return QuantkitError(
        f"{place} is not UTF-8 text (byte 0x{byte:02x}: {error.reason}): convert it, or give "
        f"another file."
    )
