"""What to calibrate on, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.spec import Frozen

DEFAULT_SOURCE = "HuggingFaceH4/ultrachat_200k@train_sft"
"""Chats that instruction-tuned models read much like, where the user gives no source."""

LONGEST_DEFAULT = 2048
"""Tokens in a sample where the user gives no length: what papers on calibration use."""

FEWEST_SAMPLES = 128
"""With fewer, scales mostly follow the choice of samples: see `observation.stability`."""

ENOUGH_SAMPLES = 256
"""With so many, most scales hardly depend on the choice of samples: see `observation.stability`."""

Packing = Literal["packed", "padded"]
"""Documents joined and cut into windows, or one document in each sample."""


class CalibrationOptions(Frozen):
    """What to calibrate on.

    Attributes:
        source: a file, a folder or a data set's name, as `open_source` says; None is
            `DEFAULT_SOURCE`.
        samples: to calibrate on.
        length: tokens in a sample, special ones included; None is 2048, or the model's maximum
            where that is less.
        packing: see `Packing`.
        held_out: samples to measure quality on; their documents calibrate nothing.
        seed: of the choice of documents.
        allow_few_samples: permits fewer than `FEWEST_SAMPLES`.
        text_column: where the text is in each row of a file or data set; None takes `text`,
            `messages`, `conversations`, or `prompt` and `completion`, whichever there is.
    """

    source: str | None = Field(default=None, min_length=1)
    samples: int = Field(default=ENOUGH_SAMPLES, ge=1)
    length: int | None = Field(default=None, ge=8)
    packing: Packing = "packed"
    held_out: int = Field(default=32, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    allow_few_samples: bool = False
    text_column: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _has_enough_samples(self) -> CalibrationOptions:
        if self.samples < FEWEST_SAMPLES and not self.allow_few_samples:
            raise ValueError(
                f"samples = {self.samples} gives scales that follow the choice of samples; give "
                f"at least {FEWEST_SAMPLES}, or set allow_few_samples (--allow-few-samples)"
            )
        return self


def read_calibration_options(given: Mapping[str, Any]) -> CalibrationOptions:
    """The options in `given`, checked.

    Raises:
        ConfigError: names the key, the value and what is allowed.
    """
    try:
        return CalibrationOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        message = str(first["msg"]).removeprefix("Value error, ")
        key = ".".join(str(part) for part in first["loc"])
        subject = f"{key} = {first['input']!r}: " if key else ""
        raise ConfigError(
            f"calibration: {subject}{message}; the keys are "
            f"{', '.join(sorted(CalibrationOptions.model_fields))}."
        ) from error
