"""Validation shared by the dialects: a third party's JSON object becomes a typed, frozen one.

Producers of checkpoints add keys of their own, so unknown keys are ignored; the keys we know must
have the right type, and whatever is wrong is said in one sentence that names key, value and fix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_quantkit.errors import ConfigError, UnsupportedScheme

MISSING = object()
"""Stands for the value of a key that is absent."""


class Fields(BaseModel):
    """Known keys of a dialect's config, strictly typed; unknown keys are ignored.

    Attributes:
        dialect: the name that errors give.
        allowed: key to the words that say what it may be.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, populate_by_name=True)

    dialect: ClassVar[str]
    allowed: ClassVar[Mapping[str, str]]

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """The config's known keys.

        Raises:
            ConfigError: a key is missing or has a value it cannot have.
        """
        try:
            return cls.model_validate(dict(config))
        except ValidationError as error:
            raise cls._explain(error) from None

    @classmethod
    def _explain(cls, error: ValidationError) -> ConfigError:
        first = error.errors(include_url=False)[0]
        path = [str(part) for part in first["loc"] if not _is_union_tag(str(part))]
        known = next((part for part in reversed(path) if part in cls.allowed), "")
        value = MISSING if first["type"] == "missing" else first["input"]
        return cls.malformed(".".join(path), value, cls.allowed.get(known, first["msg"]))

    @classmethod
    def malformed(cls, key: str, value: object, allowed: str) -> ConfigError:
        """The error of a key that is missing or has a value nothing can mean."""
        where = "the checkpoint's quantization_config"
        if value is MISSING:
            return ConfigError(
                f"{cls.dialect} config: key {key!r} is missing; it must be {allowed}. "
                f"Add it to {where}."
            )
        return ConfigError(
            f"{cls.dialect} config: key {key!r} is {value!r}, but it must be {allowed}. "
            f"Correct it in {where}."
        )

    @classmethod
    def unserved(cls, key: str, value: object, served: str, fix: str) -> UnsupportedScheme:
        """The error of a well-formed config that asks for what is not served."""
        return UnsupportedScheme(
            f"{cls.dialect} config: key {key!r} is {value!r}, which quantkit does not serve; "
            f"it serves {served}. {fix}"
        )

    @classmethod
    def regex(cls, key: str, entry: str, pattern: str) -> str:
        """`pattern`, which `entry` of `key` stands for, if it is a regular expression.

        Raises:
            ConfigError: it is not.
        """
        try:
            re.compile(pattern)
        except re.error as error:
            raise cls.malformed(key, entry, f"a regular expression ({error})") from None
        return pattern


def _is_union_tag(part: str) -> bool:
    """True where pydantic names the alternative it tried instead of a key."""
    return part in ("str", "bool") or part.startswith(("list[", "literal["))


def exactly(name: str) -> str:
    """The regular expression that matches `name` and nothing else."""
    return re.escape(name) + r"\Z"


def containing(fragment: str) -> str:
    """The regular expression that matches every name with `fragment` in it."""
    return ".*" + re.escape(fragment)


def within(names: Iterable[str]) -> str:
    """The regular expression of the modules `names`, wherever in the tree, and all inside them."""
    return rf"(?:.*\.)?(?:{'|'.join(map(re.escape, names))})(?:\..*)?\Z"


def as_pattern(name: str) -> str:
    """The regular expression of a whole name, or of `re:` and a regular expression."""
    return name.removeprefix("re:") if name.startswith("re:") else exactly(name)
