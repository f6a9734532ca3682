"""Prompts: windows of text, and files of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.evaluate.windows import Windows
from vllm_quantkit.long_generation.plan import LongPlan
from vllm_quantkit.long_generation.prompts import PromptSet, prompts_of_windows, read_prompts

DEMO = Path(__file__).parents[2] / "examples" / "tiny-lm" / "bf16"
PLAN = LongPlan(prompts=2, prompt_tokens=3)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def test_windows_are_spread_over_the_text_and_cut():
    windows = Windows(tuple((n, 1, 2, 3, 4) for n in range(9)), "held_out.txt")

    found = prompts_of_windows(windows, LongPlan(prompts=3, prompt_tokens=3))

    assert found.rows == ((0, 1, 2), (3, 1, 2), (6, 1, 2))
    assert (found.source, found.ends, found.warnings) == ("held_out.txt", False, ())


def test_fewer_windows_give_fewer_prompts_and_a_warning():
    found = prompts_of_windows(Windows(((0, 1), (2, 3)), "short.txt"), LongPlan(prompts=8))

    assert found.rows == ((0, 1), (2, 3))
    assert found.warnings == ("short.txt gives 2 prompts, not 8: intervals are wider.",)


def test_the_plan_decides_whether_texts_end():
    windows = Windows(((0, 1), (2, 3)), "t")

    assert prompts_of_windows(windows, LongPlan(ends=True)).ends
    assert not prompts_of_windows(windows, LongPlan()).ends


def test_lines_of_text_are_prompts(tmp_path, tokenizer):
    path = tmp_path / "asked.txt"
    path.write_text("Explain indexes.\n\n  \nWhat is a view?\nA third.\n")

    found = read_prompts(path, tokenizer, PLAN)

    assert [tokenizer.decode(row, skip_special_tokens=True) for row in found.rows] == [
        "Explain indexes.",
        "What is a view?",
    ]
    assert all(row[0] == tokenizer.bos_token_id for row in found.rows)
    assert found.ends
    assert found.source == "asked.txt"
    assert found.warnings == (f"Of 3 prompts in {path}, the first 2 were used.",)
    assert not read_prompts(path, tokenizer, PLAN.model_copy(update={"ends": False})).ends


def test_chats_go_through_the_template_up_to_the_answer(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "Explain foreign keys."}]
    rows = ({"messages": chat}, {"prompt": chat}, {"prompt": "Once"})
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))

    found = read_prompts(path, tokenizer, LongPlan(prompts=3))

    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(found.rows[0]) == rendered
    assert rendered.endswith("<|assistant|>")
    assert found.rows[1] == found.rows[0]
    assert tokenizer.decode(found.rows[2], skip_special_tokens=True) == "Once"


REFUSED = {
    "asked.csv": ("a,b", r"asked.csv holds no prompts: .* \.txt or \.jsonl"),
    "one.txt": ("alone\n", r"one.txt gives 1 prompts; .* at least 2"),
    "none.txt": ("", "none.txt gives 0 prompts"),
    "broken.jsonl": ('{"prompt": "a"}\n{"prompt"', r"broken.jsonl, line 2 is no JSON"),
    "empty.jsonl": ('{"prompt": "a"}\n{"text": "b"}', r"line 2 has neither a prompt"),
    "list.jsonl": ("[1]\n[2]", r"line 1 has neither a prompt"),
    "chat.jsonl": ('{"messages": ["hello"]}', r"line 1: the chat template refuses"),
    "bytes.txt": (b"\xff\xfe", r"bytes.txt cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_prompt_is_named(name, tmp_path, tokenizer):
    content, message = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(ConfigError, match=message):
        read_prompts(path, tokenizer, PLAN)


def test_a_file_that_is_not_there_is_named(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"none\.txt cannot be read"):
        read_prompts(tmp_path / "none.txt", tokenizer, PLAN)


def test_a_model_without_a_template_takes_no_chats(tmp_path):
    bare = AutoTokenizer.from_pretrained(DEMO)
    bare.chat_template = None
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}')

    with pytest.raises(ConfigError, match="has no chat template"):
        read_prompts(path, bare, PLAN)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ConfigError, match="a prompt without a token"):
        PromptSet(rows=((1,), ()), source="t", ends=True)


def test_fingerprints_tell_prompts_apart():
    first, same, other = (
        PromptSet(rows=rows, source="t", ends=True)
        for rows in (((1,), (2,)), ((1,), (2,)), ((1, 2), (2,)))
    )

    assert first.fingerprint == same.fingerprint
    assert first.fingerprint != other.fingerprint
