"""Errors a user can meet, each one full sentence with the value seen and the fix.

QuantkitError (ValueError)
├── ConfigError          a quantisation config is malformed: missing key, wrong type, bad value
├── UnsupportedScheme    a well-formed config asks for what is not served
├── CheckpointError      a tensor is missing, duplicated, misshaped, mistyped or corrupt
└── UnstableScales       another choice of calibration samples would give other scales
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class QuantkitError(ValueError):
    """Base of every error raised on purpose by vllm-quantkit."""


class ConfigError(QuantkitError):
    """A quantisation config is malformed."""


class UnsupportedScheme(QuantkitError):  # noqa: N818 - named as the field says it
    """A well-formed config asks for something that is not served."""


class CheckpointError(QuantkitError):
    """A checkpoint's tensors do not fit its config, or are corrupt."""


@contextmanager
def about(subject: str) -> Iterator[None]:
    """Says in any of these errors what it is about."""
    try:
        yield
    except QuantkitError as error:
        raise type(error)(f"{subject}: {error}") from error
