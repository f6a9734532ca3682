"""The prompts that are continued: windows of text, or what the user asks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.evaluate.windows import Windows
from vllm_quantkit.long_generation.plan import LongPlan

FEWEST = 2
"""One prompt says nothing of how much another would differ."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts as a model reads them.

    Attributes:
        rows: token ids, a tuple for each prompt.
        source: where they came from.
        ends: True where a model may end its text.
        warnings: a sentence each.

    Raises:
        ConfigError: fewer than two, or an empty one.
    """

    rows: tuple[tuple[int, ...], ...]
    source: str
    ends: bool
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.rows) < FEWEST:
            raise ConfigError(
                f"{self.source} gives {len(self.rows)} prompts; long generation needs at least "
                f"{FEWEST}, since its intervals are over prompts: give more."
            )
        if not all(self.rows):
            raise ConfigError(f"{self.source} holds a prompt without a token: take it out.")

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.rows))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens: the same for the same prompts in the same order."""
        return hashlib.sha256(repr(self.rows).encode()).hexdigest()


def prompts_of_windows(windows: Windows, plan: LongPlan) -> PromptSet:
    """The first `plan.prompt_tokens` of evenly spaced windows.

    The end-of-text token is ignored after them unless the plan says otherwise: text that was cut
    anywhere asks for nothing that an answer could end.

    Raises:
        ConfigError: there are fewer than two windows.
    """
    found = len(windows.rows)
    count = min(plan.prompts, found)
    chosen = (windows.rows[place * found // count] for place in range(count))
    return PromptSet(
        rows=tuple(row[: plan.prompt_tokens] for row in chosen),
        source=windows.source,
        ends=bool(plan.ends),
        warnings=_fewer(windows.source, count, plan.prompts),
    )


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, plan: LongPlan) -> PromptSet:
    """The first `plan.prompts` prompts of a file; models may end their answers to them.

        prompts.txt     a prompt on each line
        prompts.jsonl   a JSON object on each line: `prompt`, a string, or `messages` (or a `prompt`
                        that is a list of messages), which go through the model's chat template

    Args:
        path: of the file.
        tokenizer: of the models.
        plan: says how many, and whether answers may end.

    Raises:
        ConfigError: the file cannot be read, a line is no prompt, or there are too few.
    """
    readers = {".txt": _line, ".jsonl": _row}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"{path} holds no prompts: a file of them ends in .txt or .jsonl.")
    read = readers[path.suffix.lower()]
    rows = [tuple(read(line, tokenizer, place)) for line, place in _lines(path)]
    ends = True if plan.ends is None else plan.ends
    used = rows[: plan.prompts]
    warnings = _fewer(str(path), len(used), plan.prompts)
    if len(rows) > len(used):
        warnings = (f"Of {len(rows)} prompts in {path}, the first {len(used)} were used.",)
    return PromptSet(tuple(used), path.name, ends, warnings)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not empty, each with its place for errors."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give a file of UTF-8 text.") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield line, f"{path}, line {number}"


def _line(line: str, tokenizer: PreTrainedTokenizerBase, place: str) -> list[int]:
    return _encode(line, tokenizer)


def _row(line: str, tokenizer: PreTrainedTokenizerBase, place: str) -> list[int]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is no JSON ({error}): put one object on each line.") from error
    wanted = row.get("messages", row.get("prompt")) if isinstance(row, dict) else None
    if isinstance(wanted, str):
        return _encode(wanted, tokenizer)
    if isinstance(wanted, list):
        return _chat(wanted, tokenizer, place)
    raise ConfigError(
        f"{place} has neither a prompt (a string) nor messages (a list of objects with role and "
        f"content): give one of them."
    )


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False).input_ids
    return ids


def _chat(messages: list[Any], tokenizer: PreTrainedTokenizerBase, place: str) -> list[int]:
    """A chat up to where the model answers."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{place} holds messages, but the model's tokenizer has no chat template: give each "
            f"line a prompt, which is a string."
        )
    render: Callable[..., Any] = tokenizer.apply_chat_template
    try:
        ids = render(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{place}: the chat template refuses these messages ({error}); each must be an object "
            f"with role and content."
        ) from error
    return list(ids["input_ids"])


def _fewer(source: str, found: int, wanted: int) -> tuple[str, ...]:
    if found >= wanted:
        return ()
    return (f"{source} gives {found} prompts, not {wanted}: intervals are wider.",)
