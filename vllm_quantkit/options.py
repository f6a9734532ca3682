"""What a user can set in `--additional-config '{"quantkit": {...}}'`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.spec import PER_CHANNEL, Frozen


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


def _group_size(size: int) -> int:
    if size != PER_CHANNEL and (size < 16 or size % 16):
        raise ValueError("a group is a multiple of 16 channels, or -1 for all of them")
    return size


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    return path


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"there is no folder {str(path)!r}")
    return path


Pattern = Annotated[str, AfterValidator(_regex)]
"""A regular expression, matched from the start of a checkpoint layer's name."""


class LayerOptions(Frozen):
    """How layers are quantised at load; what is not set follows the method's default.

    Attributes:
        group_size: input channels that share a weight scale; -1 for one scale per output channel.
        symmetric: True for no zero-points.
        refine: how a group's grid is found, see `quantize.methods.data_free`.
        weight_scales: one FP8 weight scale per `channel` or per `tensor`.
        activation_scales: one dynamic FP8 activation scale per `token` or per `tensor`.
        threshold: magnitude from which LLM.int8() multiplies an input channel in 16 bits.
    """

    group_size: Annotated[int, AfterValidator(_group_size)] | None = None
    symmetric: bool | None = None
    refine: Literal["none", "clip", "hqq"] | None = None
    weight_scales: Literal["channel", "tensor"] | None = None
    activation_scales: Literal["token", "tensor"] | None = None
    threshold: float | None = Field(default=None, gt=0)

    def given(self) -> dict[str, Any]:
        """What was set."""
        fields = {name: getattr(self, name) for name in LayerOptions.model_fields}
        return {name: value for name, value in fields.items() if value is not None}


class LayerOverride(LayerOptions):
    """Options of the layers that one pattern names.

    Attributes:
        method: the name one would give to `--quantization`; None keeps the model's.
    """

    method: str | None = None


class KVCacheOptions(Frozen):
    """How keys and values are stored.

    Attributes:
        dtype: `int4` stores 4 bits; `auto` follows `--kv-cache-dtype`.
        key_group: dimensions of a key that share a scale, at 4 bits.
        value_group: the same for values.
        calibration: folder that `quantkit calibrate-kv` wrote; None looks for `kv_cache/` in the
            model's folder.
        skip_layers: decoder layers that keep 16 bits, besides those the calibration names.
        prefill: `raw` lets the tokens of one step attend to each other's keys and values as they
            are; `cached` to what the cache keeps of them, so that results do not depend on how a
            prompt was cut into steps.
    """

    dtype: Literal["auto", "int4"] = "auto"
    key_group: Literal[32, 64] = 32
    value_group: Literal[32, 64] = 64
    calibration: Annotated[Path, AfterValidator(_folder)] | None = None
    skip_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    prefill: Literal["raw", "cached"] = "raw"


class Options(LayerOptions):
    """Options of all methods; those of `LayerOptions` are for layers that no pattern names.

    Attributes:
        ignore_layers: checkpoint layers that the model need not take.
        ignore: layers that stay in 16 bits when a model is quantised at load.
        layers: pattern to how its layers are quantised at load, the first that matches; null
            leaves them in 16 bits.
        activation_stats: file with the largest input of every channel, as `quantkit calibrate`
            writes it.
        smoothing: SmoothQuant's alpha: the share of the difficulty that goes into the weights.
        kv_cache: how keys and values are stored.
    """

    ignore_layers: tuple[Pattern, ...] = ()
    ignore: tuple[Pattern, ...] = ()
    layers: dict[Pattern, LayerOverride | None] = Field(default_factory=dict)
    activation_stats: Annotated[Path, AfterValidator(_existing)] | None = None
    smoothing: float = Field(default=0.5, ge=0, le=1)
    kv_cache: KVCacheOptions = KVCacheOptions()


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
        path = ".".join(str(part) for part in first["loc"] if part != "[key]")
        allowed = _allowed(path)
        raise ConfigError(
            f"--additional-config quantkit: {path or 'quantkit'} = {first['input']!r}: "
            f"{first['msg']}; allowed keys are {', '.join(sorted(allowed.model_fields))}."
        ) from error


def _allowed(path: str) -> type[Frozen]:
    """The options that may stand where `path` does."""
    if path.startswith("layers."):
        return LayerOverride
    return KVCacheOptions if path.startswith("kv_cache.") else Options
