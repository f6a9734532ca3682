"""From a row of a data set to the text that the model would read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from vllm_quantkit.errors import QuantkitError

COLUMNS = ("text", "messages", "conversations", "prompt", "completion")
"""Where text is looked for, in this order, unless the user names a column."""

SHARED_ROLES = {"human": "user", "gpt": "assistant"}
"""Roles as ShareGPT's `from` writes them, to those of chat templates."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Document:
    """A text to calibrate on.

    Attributes:
        text: what the model would read.
        rendered: True where a chat template has put the special tokens into it.
    """

    text: str
    rendered: bool = False


@dataclass(frozen=True)
class RowReader:
    """Makes documents of rows.

    Attributes:
        tokenizer: renders chats.
        text_column: where the text is; None looks through `COLUMNS`.
    """

    tokenizer: PreTrainedTokenizerBase
    text_column: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it may read."""
        return COLUMNS if self.text_column is None else (self.text_column,)

    def read(self, row: Row, place: str) -> Document:
        """The row's text, or its chat through the tokenizer's template.

        Args:
            row: column to value.
            place: the row's file and line, for errors.

        Raises:
            QuantkitError: names the place and what the row lacks.
        """
        found = {name: row[name] for name in self.columns if row.get(name) is not None}
        if self.text_column is None and {"prompt", "completion"} == found.keys():
            return self._completed(found["prompt"], found["completion"], place)
        for name, value in found.items():
            if self.text_column is not None or name not in ("prompt", "completion"):
                return self._document(value, place, name)
        wanted = self.text_column or "text, messages, conversations, or prompt and completion"
        raise QuantkitError(
            f"{place} has the columns {', '.join(map(str, row)) or '(none)'}, of which none holds "
            f"{wanted}: name the column of the text with --text-column."
        )

    def _completed(self, prompt: object, completion: object, place: str) -> Document:
        """Two strings joined, or two lists of messages joined and rendered."""
        if isinstance(prompt, str) and isinstance(completion, str):
            return Document(prompt + completion)
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._document(prompt + completion, place, "prompt and completion")
        raise QuantkitError(
            f"{place}: prompt is {_kind(prompt)} and completion {_kind(completion)}; both must be "
            f"strings, or both lists of messages."
        )

    def _document(self, value: object, place: str, column: str) -> Document:
        if isinstance(value, str):
            return Document(value)
        if isinstance(value, Sequence):
            messages = [_message(item, place, column) for item in value]
            return Document(self._rendered(messages, place), rendered=True)
        raise QuantkitError(
            f"{place}: {column} is {_kind(value)}; it must be a string or a list of messages."
        )

    def _rendered(self, messages: list[dict[str, Any]], place: str) -> str:
        if self.tokenizer.chat_template is None:
            raise QuantkitError(
                f"{place} holds a chat, but the model's tokenizer has no chat template: give a "
                f"source of plain text, such as --calibration FILE.txt."
            )
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except jinja2.TemplateError as error:
            raise QuantkitError(
                f"{place}: the chat template refuses this chat ({error}); take it out, or give "
                f"another source with --calibration."
            ) from error


def _message(item: object, place: str, column: str) -> dict[str, Any]:
    """A chat template's message, made of one or of ShareGPT's {from, value}."""
    if isinstance(item, Mapping):
        if "role" in item and "content" in item:
            return dict(item)
        if "from" in item and "value" in item:
            role = str(item["from"])
            return {"role": SHARED_ROLES.get(role, role), "content": item["value"]}
    raise QuantkitError(
        f"{place}: {column} holds {_kind(item)} that is no message; each must be an object with "
        f"role and content, or with from and value."
    )


def _kind(value: object) -> str:
    names = {str: "a string", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), repr(value)[:40])
