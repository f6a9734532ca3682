"""Where calibration text comes from: every kind of source, and what is refused."""

from __future__ import annotations

import importlib
import json
from importlib import util
from pathlib import Path

import pytest

from tests.tiny_models import make_tokenizer
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.quantize.calibration.rows import Document, RowReader
from vllm_quantkit.quantize.calibration.sources import HUB_NAME, open_source, text_parts

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] not in ('user', 'assistant') %}{{ raise_exception('no ' + m['role']) }}"
    "{% endif %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
)
CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
SHARED = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]
RENDERED = "<|begin|>[user]one<|endoftext|>[assistant]two<|endoftext|>"


@pytest.fixture(scope="module")
def reader() -> RowReader:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return RowReader(tokenizer)


def documents(source: Path | str, reader: RowReader) -> list[Document]:
    return list(open_source(str(source), reader).documents())


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", ["txt", "md", "TXT"])
def test_a_text_file_is_one_text(ending, reader, tmp_path):
    path = tmp_path / f"notes.{ending}"
    path.write_text("\ufeffnaïve\n\ntext", encoding="utf-8")

    source = open_source(str(path), reader)

    assert source.one_text
    assert source.description == f"notes.{ending}"
    assert list(source.documents()) == [Document("naïve\n\ntext")]
    assert list(source.documents()) == [Document("naïve\n\ntext")]  # a second time as well


@pytest.mark.parametrize("gap", ["\n\n", "\n", " ", "-"])
@pytest.mark.parametrize("size", [1, 7, 40, 1000])
def test_a_long_text_comes_in_parts_that_lose_nothing(gap, size, tmp_path):
    path = tmp_path / "long.txt"
    text = gap.join(f"word{number}" for number in range(60)) + gap
    path.write_text(text)

    parts = list(text_parts(path, size))

    assert "".join(parts) == text
    assert all(0 < len(part) <= 2 * size for part in parts)
    if gap != "-" and size == 40:
        # Cut before a word, not inside one.
        assert all(part.startswith(gap) for part in parts[1:])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "one"}, Document("one")),
        ({"text": "one", "messages": CHAT}, Document("one")),
        ({"text": None, "messages": CHAT}, Document(RENDERED, rendered=True)),
        ({"conversations": SHARED}, Document(RENDERED, rendered=True)),
        ({"conversations": CHAT}, Document(RENDERED, rendered=True)),
        ({"prompt": "one ", "completion": "two"}, Document("one two")),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, Document(RENDERED, rendered=True)),
        ({"prompt": "a column of its own", "messages": CHAT}, Document(RENDERED, rendered=True)),
    ],
)
def test_rows_of_every_kind(row, expected, reader, tmp_path):
    assert documents(write_lines(tmp_path / "rows.jsonl", row), reader) == [expected]


def test_a_byte_order_mark_is_no_part_of_the_first_line(reader, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}')

    assert documents(tmp_path / "rows.jsonl", reader) == [Document("one"), Document("two")]


def test_a_column_can_be_named(reader, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", {"text": "no", "prompt": "yes", "chat": CHAT})

    assert documents(path, RowReader(reader.tokenizer, "prompt")) == [Document("yes")]
    assert documents(path, RowReader(reader.tokenizer, "chat")) == [Document(RENDERED, True)]
    with pytest.raises(QuantkitError, match=r"line 1 has the columns text, prompt, chat, of which"):
        documents(path, RowReader(reader.tokenizer, "nonesuch"))


FAULTS = {
    '{"text": "cut': r"line 3 is not JSON \(Unterminated string starting at at column 10\)",
    '["text"]': r"line 3 holds '\[\"text\"\]': each line must be an object",
    '{"other": 1}': r"line 3 has the columns other, of which none holds text, messages,",
    "{}": r"line 3 has the columns \(none\), of which",
    '{"text": 7}': r"line 3: text is 7; it must be a string or a list of messages",
    '{"messages": ["hello"]}': r"line 3: messages holds a string that is no message; each must",
    '{"messages": [{"role": "user"}]}': r"line 3: messages holds an object that is no message",
    '{"prompt": "a", "completion": []}': r"line 3: prompt is a string and completion a list; both",
    '{"prompt": "a"}': r"line 3 has the columns prompt, of which none holds .* --text-column",
    '{"messages": [{"role": "cook", "content": "x"}]}': r"refuses this chat \(no cook\); take it",
}


@pytest.mark.parametrize("line", FAULTS)
def test_a_malformed_line_is_named(line, reader, tmp_path):
    path = tmp_path / "rows.jsonl"
    # The empty line counts, and is no error.
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')

    with pytest.raises(QuantkitError, match=FAULTS[line]) as error:
        documents(path, reader)

    assert str(error.value).startswith(str(path))


def test_a_chat_needs_a_template(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", {"messages": CHAT})

    with pytest.raises(QuantkitError, match="line 1 holds a chat, but the model's tokenizer"):
        documents(path, RowReader(make_tokenizer()))


def test_bytes_that_are_not_utf8_are_refused(reader, tmp_path):
    text, rows = tmp_path / "latin.txt", tmp_path / "latin.jsonl"
    text.write_bytes("naïve".encode("latin-1"))
    rows.write_bytes(b'{"text": "fine"}\n' + '{"text": "naïve"}\n'.encode("latin-1"))

    with pytest.raises(QuantkitError, match=r"latin.txt is not UTF-8 text \(byte 0xef"):
        documents(text, reader)
    with pytest.raises(QuantkitError, match=r"latin.jsonl, line 2 is not UTF-8 text \(byte 0xef"):
        documents(rows, reader)


def test_a_folders_files_in_order(reader, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "c.txt").write_text("third")
    write_lines(tmp_path / "b" / "a.jsonl", {"text": "first"}, {"text": "second"})
    (tmp_path / ".git" / "a.txt").write_text("hidden")
    (tmp_path / "weights.bin").write_bytes(b"\xff")

    source = open_source(str(tmp_path), reader)

    assert [document.text for document in source.documents()] == ["first", "second", "third"]
    assert source.description == f"{tmp_path.name}/"
    assert not source.one_text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nonesuch.txt", "there is no file or folder nonesuch.txt; give --calibration FILE"),
        ("a/b/c", "there is no file or folder a/b/c; give"),
        (
            "weights.bin",
            "weights.bin cannot be calibrated on: a file must end in .txt",
        ),
        ("empty", "empty holds nothing to calibrate on: no file in it ends in .txt"),
    ],
)
def test_what_is_no_source_is_refused(name, said, reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").touch()
    (tmp_path / "empty").mkdir()

    with pytest.raises(QuantkitError, match=said):
        documents(name, reader)


def test_parquet_rows_are_read_like_lines(reader, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), importlib.import_module("pyarrow.parquet")
    rows = [{"id": 1, "messages": CHAT}, {"id": 2, "messages": None}]
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows[:1] * 100 + rows[1:]), path)

    found = open_source(str(path), reader).documents()

    assert [next(found) for _ in range(100)] == [Document(RENDERED, rendered=True)] * 100
    with pytest.raises(QuantkitError, match=r"rows.parquet, row 101 has the columns messages, of"):
        next(found)


def test_a_damaged_parquet_file_is_refused(reader, tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and then nothing of use PAR1")

    with pytest.raises(QuantkitError, match=r"rows.parquet cannot be read as parquet: "):
        documents(tmp_path / "rows.parquet", reader)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("gsm8k", ("gsm8k", None, None)),
        ("me/set-1.0", ("me/set-1.0", None, None)),
        ("me/set:main", ("me/set", "main", None)),
        ("me/set@train", ("me/set", None, "train")),
        ("me/set:2023-10.en@train[:1%]", None),
        ("me/set:a b@train", ("me/set", "a b", "train")),
    ],
)
def test_names_of_data_sets(given, parts):
    found = HUB_NAME.fullmatch(given)

    assert (found and (found["name"], found["config"], found["split"])) == parts


def test_a_data_set_is_streamed(reader, tmp_path, monkeypatch):
    """The library reads a local file here; how it is asked for one of the hub is noted."""
    datasets = pytest.importorskip("datasets")
    path = write_lines(tmp_path / "rows.jsonl", {"messages": CHAT}, {"messages": CHAT[:1]})
    local, asked = datasets.load_dataset, []

    def load(*args: object, **options: object) -> object:
        asked.append((args, options))
        return local("json", data_files=str(path), split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load)

    source = open_source("me/chats:small@test", reader)

    assert next(source.documents()).text == RENDERED
    assert asked == [(("me/chats", "small"), {"split": "test", "streaming": True})]
    assert source.description == "me/chats:small@test"
    assert open_source("me/chats", reader).description == "me/chats@train"


def test_a_hub_out_of_reach_is_said_in_a_sentence(reader, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host.")

    monkeypatch.setattr(datasets, "load_dataset", fail)

    with pytest.raises(QuantkitError) as error:
        documents("me/chats:small", reader)

    assert str(error.value) == (
        "the data set me/chats (config small, split train) cannot be read from the hub "
        "(ConnectionError: no route to host); give your own text with --calibration FILE."
    )


@pytest.mark.parametrize(
    ("source", "missing"), [("me/chats", "datasets"), ("rows.parquet", "pyarrow")]
)
def test_a_missing_library_is_named(source, missing, reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.parquet").touch()
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == missing else name)

    with pytest.raises(QuantkitError, match=r"without \w+: run pip install 'vllm-quantkit\[data\]"):
        open_source(source, reader)
