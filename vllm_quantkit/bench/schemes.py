"""Ways to serve a model, as `--schemes` names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_quantkit.engine.client import EngineSpec
from vllm_quantkit.errors import ConfigError, UnsupportedScheme
from vllm_quantkit.options import read_options
from vllm_quantkit.schemes.registry import SCHEMES, get_method

PLAIN = ("16-bit", "bf16", "fp16")
"""Names of the model as it is, in 16 bits; its config.json says in which."""

VLLM = "vllm"
AUTO = "quantkit"
KV4, KV4_METHOD = "+kv4", "quantkit-kv4"
"""Suffix of a scheme whose KV cache is INT4, and the method that has one beside 16-bit weights."""

INT4_CACHE = {"quantkit": {"kv_cache": {"dtype": "int4"}}}

Config = Mapping[str, Any]
Configs = Callable[[str], Config | None]
"""A model's `quantization_config` by its folder or name; None where it is in 16 bits."""

FORMS = (
    "16-bit; vllm, or vllm:METHOD of vLLM's own; " + ", ".join(SCHEMES) + "; or LABEL=FOLDER of "
    "another checkpoint, with @METHOD behind it to name the method; each with +kv4 for an INT4 "
    "KV cache"
)


@dataclass(frozen=True)
class Scheme:
    """One way to serve, as it was written.

    Attributes:
        label: what it is called in tables.
        model: folder or name of another checkpoint; None for the model itself.
        method: `16-bit`, `vllm`, `vllm:METHOD`, or a name of `SCHEMES`; None for what the
            checkpoint is.
        int4_cache: True with `+kv4`.
    """

    label: str
    model: str | None
    method: str | None
    int4_cache: bool

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """One element of `--schemes`.

        Raises:
            ConfigError: it has none of the `FORMS`.
        """
        bare = text.removesuffix(KV4)
        label, equals, rest = bare.partition("=")
        if equals:
            model, _, method = rest.partition("@")
            scheme = cls(label, model, method or None, bare != text)
        else:
            scheme = cls(text, None, bare, bare != text)
        if not scheme.label or scheme.model == "" or not _is_method(scheme.method):
            raise ConfigError(f"--schemes {text!r} is no scheme: give {FORMS}.")
        return scheme


def parse_schemes(text: str | None, config: Config | None) -> list[Scheme]:
    """The schemes of a comma-separated list; without one, 16 bits or what the checkpoint is.

    Args:
        text: as given to `--schemes`.
        config: the model's `quantization_config`.

    Raises:
        ConfigError: one has no form of a scheme, or two have the same name.
    """
    if text is None:
        text = PLAIN[0] if config is None else AUTO
    schemes = [Scheme.parse(part.strip()) for part in text.split(",") if part.strip()]
    labels = [scheme.label for scheme in schemes]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None or not labels:
        raise ConfigError(
            f"--schemes {text!r} "
            + (f"has {twice!r} twice" if twice else "names no scheme")
            + ": give each a name of its own, as in mine=FOLDER."
        )
    return schemes


def make_spec(scheme: Scheme, model: str, base: EngineSpec, configs: Configs) -> EngineSpec:
    """The engine that serves `scheme`, refused here rather than after a start of half a minute.

    Args:
        scheme: which way.
        model: folder or name of the model that is measured.
        base: what all engines have in common.
        configs: reads a model's `quantization_config`.

    Raises:
        ConfigError: the scheme does not fit the model.
        UnsupportedScheme: the method does not serve it.
        CheckpointError: there is no such checkpoint.
    """
    served = scheme.model or model
    config = configs(served)
    options = dict(base.options)
    method = _method(scheme, served, config)
    if scheme.int4_cache:
        options["additional_config"] = _merged(options.get("additional_config", {}), INT4_CACHE)
    if method in SCHEMES:
        _check(method, config, options.get("additional_config", {}))
    return replace(base, model=served, quantization=method, options=tuple(options.items()))


def _method(scheme: Scheme, model: str, config: Config | None) -> str | None:
    """What `--quantization` is to be."""
    wanted = scheme.method or (PLAIN[0] if config is None else AUTO)
    if wanted in PLAIN:
        if config is not None:
            found = config.get("quant_method", "unnamed")
            raise ConfigError(
                f"--schemes {scheme.label!r}: {model} is quantised already (quant_method "
                f"{found!r}): name its 16-bit model, as in 16-bit=FOLDER."
            )
        return KV4_METHOD if scheme.int4_cache else None
    owner, _, name = wanted.partition(":")
    if owner != VLLM:
        return wanted
    if scheme.int4_cache:
        raise UnsupportedScheme(
            f"--schemes {scheme.label!r}: the INT4 KV cache is vllm-quantkit's, plain vLLM has "
            f"none: use {AUTO}{KV4}, or a method's name with {KV4}."
        )
    return name or None


def _check(method: str, config: Config | None, additional: Config) -> None:
    """The method's own refusal, if it has one.

    Raises:
        ConfigError, UnsupportedScheme: as `Method.at_load` and `Method.rules`.
    """
    options = read_options(additional)
    if config is None:
        get_method(method).at_load(options)
    else:
        get_method(method).rules(config)


def _is_method(name: str | None) -> bool:
    return name is None or name in (*PLAIN, VLLM, *SCHEMES) or name.startswith(f"{VLLM}:")


def _merged(left: Config, right: Config) -> dict[str, Any]:
    """Both, `right` over `left`, mappings within them alike."""
    both = {**left, **right}
    for key in left.keys() & right.keys():
        if isinstance(left[key], Mapping) and isinstance(right[key], Mapping):
            both[key] = _merged(left[key], right[key])
    return both


def model_config(model: str) -> Config | None:
    """The model's `quantization_config`.

    Raises:
        CheckpointError: there is no such model.
    """
    from vllm_quantkit.footprint import read_model

    return read_model(model).facts.quantization_config
