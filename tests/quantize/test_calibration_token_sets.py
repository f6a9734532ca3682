"""Samples of tokens: what they are made of, and what calibration and held-out sets never share."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import BOS, EOS, make_tokenizer
from vllm_quantkit.errors import ConfigError, QuantkitError
from vllm_quantkit.quantize.calibration import (
    CalibrationOptions,
    TokenSet,
    TokenSets,
    load_token_sets,
    read_calibration_options,
)
from vllm_quantkit.quantize.calibration import stream as stream_module
from vllm_quantkit.quantize.calibration.sources import text_parts
from vllm_quantkit.quantize.calibration.stream import shuffled

MAXIMUM = 4096


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    if template is not None:
        specials = [(BOS, tokenizer.bos_token_id), (EOS, tokenizer.eos_token_id)]
        processor = TemplateProcessing(single=template, special_tokens=specials)
        tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


PLAIN = tokenizer_with(None)
WITH_BOS = tokenizer_with(f"{BOS} $A")
WITH_BOTH = tokenizer_with(f"{BOS} $A {EOS}")


def options(source: Path, **given: object) -> CalibrationOptions:
    few = {"samples": 6, "held_out": 3, "length": 16, "allow_few_samples": True}
    return CalibrationOptions.model_validate({"source": str(source), **few, **given})


def sentence(number: int, words: int) -> str:
    """A text that no other number makes: its digits are tokens of their own."""
    chosen = random.Random(number).choices("abcdefgh", k=words)
    return f"<{number}>" + " ".join(f"{letter}{number}" for letter in chosen)


def write_documents(path: Path, sizes: Sequence[int]) -> list[str]:
    texts = [sentence(number, words) for number, words in enumerate(sizes)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def write_text(path: Path, tokens: int) -> list[int]:
    """A text of at least as many tokens, of which no two windows are alike; gives all its ids."""
    letters = random.Random(tokens).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=4 * tokens)
    path.write_text(" ".join(letters))
    return PLAIN(path.read_text(), add_special_tokens=False, verbose=False).input_ids


def numbers(samples: Tensor) -> set[int]:
    """The documents, of `write_documents`, whose start is in the samples."""
    text = PLAIN.decode(samples.flatten().tolist())
    return {int(part.partition(">")[0]) for part in text.split("<") if part.split(">")[0].isdigit()}


def is_in(window: list[int], tokens: list[int]) -> list[int]:
    """Where the window begins in tokens."""
    size = len(window)
    return [at for at in range(len(tokens) - size + 1) if tokens[at : at + size] == window]


@pytest.mark.parametrize(("tokenizer", "before"), [(PLAIN, 0), (WITH_BOS, 1), (WITH_BOTH, 1)])
@pytest.mark.parametrize("part", [64, 1 << 20])
def test_windows_of_one_text_are_disjoint(tokenizer, before, part, tmp_path, monkeypatch):
    monkeypatch.setattr(text_parts, "__defaults__", (part,))
    tokens = write_text(tmp_path / "text.txt", 200)

    sets = load_token_sets(options(tmp_path / "text.txt"), tokenizer, MAXIMUM)

    windows = torch.cat([sets.calibration.input_ids, sets.held_out.input_ids])
    assert windows.shape == (9, 16)
    assert windows.dtype == torch.int64
    assert sets.calibration.attention_mask is None
    assert (windows[:, :before] == PLAIN.bos_token_id).all()
    places = [is_in(window, tokens) for window in windows[:, before:].tolist()]
    assert all(len(place) == 1 for place in places)
    places = sorted(place[0] for place in places)
    assert all(b - a >= 16 - before for a, b in pairwise(places))
    assert len(sets.warnings) == 2
    assert "is one text, so held-out samples are other windows" in sets.warnings[1]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=20, max_size=40),
    length=st.integers(8, 24),
    packing=st.sampled_from(["packed", "padded"]),
    seed=st.integers(0, 2**31),
    samples=st.integers(1, 7),
)
def test_no_document_is_in_both_sets(tmp_path_factory, sizes, length, packing, seed, samples):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = write_documents(path, [size + 3 for size in sizes])
    chosen = options(path, length=length, packing=packing, seed=seed)

    few = load_token_sets(chosen.model_copy(update={"samples": samples}), WITH_BOS, MAXIMUM)
    more = load_token_sets(chosen.model_copy(update={"samples": samples + 1}), WITH_BOS, MAXIMUM)
    again = load_token_sets(chosen.model_copy(update={"samples": samples}), WITH_BOS, MAXIMUM)

    # Windows that start inside a document have it from an earlier window of the same set.
    first, second = numbers(few.calibration.input_ids), numbers(few.held_out.input_ids)
    assert first
    assert second
    assert first.isdisjoint(second)
    assert few.held_out.fingerprint == more.held_out.fingerprint
    shared = [x.input_ids[:samples, :8] for x in (few.calibration, more.calibration)]
    assert torch.equal(*shared)
    assert few.calibration.fingerprint == again.calibration.fingerprint
    assert few.calibration.fingerprint != more.calibration.fingerprint
    assert few.calibration.samples == samples
    assert len(texts) == len(sizes)


def test_packed_windows_hold_documents_with_an_end_behind_each(tmp_path):
    texts = write_documents(tmp_path / "rows.jsonl", [9, 3, 30, 4] * 8)
    ends = {(*ids(text), PLAIN.eos_token_id) for text in texts}

    sets = load_token_sets(options(tmp_path / "rows.jsonl"), WITH_BOS, MAXIMUM)

    for rows in (sets.calibration.input_ids, sets.held_out.input_ids):
        assert (rows[:, 0] == WITH_BOS.bos_token_id).all()
        stream = rows[:, 1:].flatten().tolist()
        while PLAIN.eos_token_id in stream:
            end = stream.index(PLAIN.eos_token_id) + 1
            assert tuple(stream[:end]) in ends
            stream = stream[end:]
        assert any(tuple(stream) == text[: len(stream)] for text in ends)


def test_padded_samples_are_a_document_each(tmp_path):
    texts = write_documents(tmp_path / "rows.jsonl", [2, 3, 40, 5, 1] * 4)
    wrapped = [[0, *ids(text), 1][:16] for text in texts]

    sets = load_token_sets(options(tmp_path / "rows.jsonl", packing="padded"), WITH_BOTH, MAXIMUM)

    rows = []
    for part in (sets.calibration, sets.held_out):
        assert part.attention_mask is not None
        for row, mask in zip(part.input_ids.tolist(), part.attention_mask.tolist(), strict=True):
            kept = sum(mask)
            assert mask == [1] * kept + [0] * (len(row) - kept)
            assert set(row[kept:]) <= {PLAIN.pad_token_id}
            rows.append(row[:kept])
        assert part.tokens == int(part.attention_mask.sum()) < part.input_ids.numel()
    assert all(row in wrapped for row in rows)
    assert len({tuple(row) for row in rows}) == len(rows) == 9


def ids(text: str) -> list[int]:
    return PLAIN(text, add_special_tokens=False).input_ids


def test_a_chat_has_its_templates_special_tokens_once(tmp_path):
    tokenizer = tokenizer_with(f"{BOS} $A")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}"
        "{% endfor %}"
    )
    path = tmp_path / "chats.jsonl"
    chats = [[{"role": "user", "content": f"question {number}"}] for number in range(20)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    expected = {(0, *ids(f"[user]question {number}"), PLAIN.eos_token_id) for number in range(20)}

    padded = load_token_sets(options(path, packing="padded", length=40), tokenizer, MAXIMUM)
    packed = load_token_sets(options(path, samples=2, held_out=1, length=40), tokenizer, MAXIMUM)

    mask = padded.calibration.attention_mask
    rows = padded.calibration.input_ids
    kept = [row if mask is None else row[m.bool()] for row, m in zip(rows, mask, strict=True)]
    assert {tuple(row.tolist()) for row in kept} <= expected
    assert (packed.calibration.input_ids == 0).sum(1).tolist() == [1, 1]
    assert not is_in([1, 1], packed.calibration.input_ids[0].tolist())


def test_half_a_surrogate_pair_is_no_reason_to_stop(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "\\ud83d and {number} more"}}\n' for number in range(40)))

    assert load_token_sets(options(path), PLAIN, MAXIMUM).calibration.samples == 6


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_repeated_documents_are_left_out(packing, tmp_path):
    path = tmp_path / "rows.jsonl"
    write_documents(path, [20] * 16)
    once = load_token_sets(options(path, packing=packing), PLAIN, MAXIMUM)
    path.write_text(path.read_text() * 2)

    sets = load_token_sets(options(path, packing=packing), PLAIN, MAXIMUM)

    assert sets.calibration.fingerprint == once.calibration.fingerprint
    assert sets.warnings[-1] == "16 documents of rows.jsonl repeat others and were left out."


def test_documents_too_short_to_predict_anything_are_left_out(tmp_path):
    texts = ["", "a", *(sentence(number, 9) for number in range(9))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    sets = load_token_sets(options(path, packing="padded"), WITH_BOTH, MAXIMUM)

    assert sets.calibration.samples + sets.held_out.samples == 9
    with pytest.raises(QuantkitError, match="3 of 3 held-out and then 6 of 7 calibration"):
        load_token_sets(options(path, packing="padded", samples=7), WITH_BOTH, MAXIMUM)


def test_the_seed_chooses(tmp_path):
    write_documents(tmp_path / "rows.jsonl", [9] * 60)
    chosen = [options(tmp_path / "rows.jsonl", seed=seed) for seed in (0, 0, 1)]

    first, same, other = (load_token_sets(each, PLAIN, MAXIMUM) for each in chosen)

    assert first.calibration.fingerprint == same.calibration.fingerprint
    assert first.calibration.fingerprint != other.calibration.fingerprint
    assert first.held_out.fingerprint != other.held_out.fingerprint


@pytest.mark.parametrize(
    ("name", "sizes", "changes", "said"),
    [
        ("text.txt", None, {}, r"text.txt \(one text\) gives 3 of 3 held-out and then 2 of 6 cal"),
        ("rows.jsonl", [14] * 3, {}, r"\(3 documents\) gives \d of 3 held-out and then \d of 6"),
        ("rows.jsonl", [], {}, r"\(0 documents\) gives 0 of 3 held-out and then 0 of 6"),
        ("rows.jsonl", [3] * 8, {"packing": "padded"}, r"3 of 3 held-out and then 5 of 6 cal"),
    ],
)
def test_too_little_text_says_how_much_there_is(name, sizes, changes, said, tmp_path):
    path = tmp_path / name
    if sizes is None:
        tokens = write_text(path, 40)
        path.write_text(PLAIN.decode(tokens[: 5 * 16 + 9]))
    else:
        write_documents(path, sizes)

    with pytest.raises(QuantkitError, match=said) as error:
        load_token_sets(options(path, **changes), PLAIN, MAXIMUM)

    assert str(error.value).endswith(
        "samples of 16 tokens: give more text, or lower --samples, --held-out or --length."
    )


def test_no_more_is_read_than_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "DOCUMENTS", 30)
    write_documents(tmp_path / "rows.jsonl", [20] * 60)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("this line would be refused\n")

    assert (
        load_token_sets(options(tmp_path / "rows.jsonl"), PLAIN, MAXIMUM).calibration.samples == 6
    )


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 60), room=st.integers(1, 20), seed=st.integers(0, 99))
def test_the_buffer_gives_each_item_once_and_reads_little_ahead(count, room, seed):
    read = []
    items = (read.append(item) or item for item in range(count))

    stream = shuffled(items, seed, room)
    first = list(islice(stream, 5))

    assert len(read) <= room + 5
    everything = first + list(stream)
    assert sorted(everything) == list(range(count))
    assert everything == list(shuffled(iter(range(count)), seed, room))


def test_long_documents_fill_the_buffer_sooner(monkeypatch):
    monkeypatch.setattr(stream_module, "CHARACTERS", 100)
    read = []
    items = (read.append(item) or item for item in ["x" * 60] * 9)

    next(shuffled(items, 0, 1000, len))

    assert len(read) == 2


@pytest.mark.parametrize(("maximum", "expected"), [(64, 64), (4096, 2048)])
def test_the_default_length_is_what_the_model_takes(maximum, expected, tmp_path):
    write_text(tmp_path / "text.txt", 3 * expected)
    chosen = options(tmp_path / "text.txt", length=None, samples=1, held_out=1)

    sets = load_token_sets(chosen, PLAIN, maximum)

    assert sets.calibration.input_ids.shape == (1, expected)
    with pytest.raises(QuantkitError, match=rf"of {maximum + 1} tokens do not fit this model, wh"):
        load_token_sets(chosen.model_copy(update={"length": maximum + 1}), PLAIN, maximum)


@settings(max_examples=50, deadline=None)
@given(samples=st.integers(1, 13), size=st.integers(1, 6), padded=st.booleans())
def test_batches_never_mix_the_halves(samples, size, padded):
    rows = torch.arange(samples)[:, None].expand(-1, 3).contiguous()
    tokens = TokenSet(rows, torch.ones_like(rows) if padded else None, "somewhere")

    batches = list(tokens.batches(size))

    seen = [(int(row[0]), half) for ids, _, half in batches for row in ids]
    assert sorted(seen) == [(index, index % 2) for index in range(samples)]
    assert seen == sorted(seen, key=lambda pair: (pair[1], pair[0]))
    assert all(1 <= len(ids) <= size for ids, _, _ in batches)
    assert all((mask is not None) == padded for _, mask, _ in batches)


@settings(max_examples=50, deadline=None)
@given(place=st.integers(0, 11), masked=st.booleans())
def test_the_fingerprint_changes_with_any_token(place, masked):
    rows = torch.arange(12).view(3, 4)
    mask = torch.ones_like(rows) if masked else None
    original = TokenSet(rows, mask, "somewhere")
    other = rows.clone()
    other.view(-1)[place] += 1

    assert original.fingerprint == TokenSet(rows.clone(), mask, "elsewhere").fingerprint
    assert original.fingerprint != TokenSet(other, mask, "somewhere").fingerprint
    assert original.fingerprint != TokenSet(rows.view(4, 3), None, "somewhere").fingerprint
    if mask is not None:
        fewer = mask.clone()
        fewer.view(-1)[place] = 0
        assert original.fingerprint != TokenSet(rows, fewer, "somewhere").fingerprint
        assert original.fingerprint != TokenSet(rows, None, "somewhere").fingerprint


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"samples": 127}, "calibration: samples = 127 gives scales that follow .* at least 128"),
        ({"samples": 0}, "calibration: samples = 0: Input should be greater than or equal to 1"),
        ({"packing": "loose"}, "packing = 'loose': Input should be 'packed' or 'padded'"),
        ({"length": 4}, "length = 4: Input should be greater than or equal to 8"),
        ({"size": 4}, "size = 4: Extra inputs are not permitted; the keys are allow_few_samples"),
    ],
)
def test_options_are_checked(given, said):
    with pytest.raises(ConfigError, match=said):
        read_calibration_options(given)


def test_few_samples_are_allowed_on_request_and_warned_of(tmp_path):
    write_text(tmp_path / "text.txt", 600)
    chosen = read_calibration_options({"source": str(tmp_path / "text.txt"), "samples": 128})
    few = chosen.model_copy(update={"length": 8, "held_out": 1})

    said = load_token_sets(few, PLAIN, MAXIMUM).warnings
    enough = few.model_copy(update={"samples": 256})

    assert said[0].startswith("128 calibration samples: with fewer than 256, scales depend")
    sets: TokenSets = load_token_sets(enough, PLAIN, MAXIMUM)
    assert not any("calibration samples" in warning for warning in sets.warnings)
    assert read_calibration_options({"samples": 2, "allow_few_samples": True}).samples == 2
