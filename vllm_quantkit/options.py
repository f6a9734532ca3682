"""What a user can set in `--additional-config '{"quantkit": {...}}'`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError, field_validator

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.spec import Frozen


class Options(Frozen):
    """Options of all methods.

    Attributes:
        ignore_layers: regular expressions of checkpoint layers that the model need not take.
    """

    ignore_layers: tuple[str, ...] = ()

    @field_validator("ignore_layers")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return patterns


def read_options(additional_config: Mapping[str, Any]) -> Options:
    """The options under the key `quantkit`.

    Raises:
        ConfigError: names the key, the value and what is allowed.
    """
    given = additional_config.get("quantkit", {})
    try:
        return Options.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "quantkit"
        raise ConfigError(
            f"--additional-config quantkit: {key} = {first['input']!r}: {first['msg']}; "
            f"allowed keys are {', '.join(Options.model_fields)}."
        ) from error
